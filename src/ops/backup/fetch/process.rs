//! The fetcher of an attach, as a process.

use super::{AGAIN_BEHIND, Fetching, Layer, Problem, REFUSED_AGAIN, Report};
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result, child};
use crate::catalog::VolumeId;
use crate::crypt::BackupKeys;
use crate::crypt::secret_mem::{SecretFd, SecretMem, on_scrubbed_stack};
use crate::events::EventLog;
use crate::helper::carry::Carriers;
use crate::helper::fetch::{Begin, MAX_LINE, Said};
use crate::ops::Store;
use crate::sandbox::{self, Access, Rule};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

/// The fetcher of an attach: the whole life of the process.
///
/// # Errors
/// Only when the other side could not even be told.
pub(crate) fn help(store: &Store) -> Result<()> {
    let socket = child::begin()?;
    let begun = begin(store, &socket);
    let catalog = store.catalog();
    let Begun { carriers, events, volume, layers, mut lines } = match begun {
        Ok(begun) => begun,
        Err(e) => {
            let message = e.to_string().chars().take(8000).collect();
            return Ok(wire::say(&socket, &Said::Failed { kind: e.kind().name().into(), message })?);
        }
    };
    for (at, layer) in layers.iter().enumerate() {
        match layer {
            Found::Coming(layer) => {
                for holes in layer.holes() {
                    let count = holes.end - holes.start;
                    wire::say(&socket, &Said::Here { layer: at, first: holes.start, count })?;
                }
            }
            Found::Whole => wire::say(&socket, &Said::Whole { layer: at })?,
            Found::Gone => wire::say(&socket, &Said::Gone { layer: at })?,
        }
    }
    wire::say(&socket, &Said::Ready)?;
    let layers = layers.into_iter().map(Found::coming).collect();
    let mut fetching = Fetching::new(&catalog, &carriers, layers, Report { events: &events, volume });
    fetching.host = Some(Mutex::new(&socket));
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(|| fetching.hear(&mut lines, &socket));
        scope.spawn(|| fetching.bring_what_is_asked());
        scope.spawn(|| fetching.watch());
        let mut told = false;
        let brought = fetching.bring_all(&mut |_, _, problem| {
            match problem {
                Some(Problem::Away(_)) => std::thread::sleep(AGAIN_BEHIND),
                Some(Problem::Refused(_, e)) => {
                    if !std::mem::replace(&mut told, true) {
                        fetching.event("failed", e.to_string());
                    }
                    std::thread::sleep(REFUSED_AGAIN);
                }
                None => {}
            }
            Ok(())
        });
        if let Err(e) = &brought {
            log::error!("what is still to come of {volume}: {e}");
        }
        std::process::exit(i32::from(brought.is_err()));
    })
}

struct Begun {
    carriers: Carriers,
    events: EventLog,
    volume: VolumeId,
    layers: Vec<Found>,
    lines: Lines,
}

/// What there is of a layer that was still to come.
enum Found {
    Coming(Box<Layer>),
    /// All of it has come.
    Whole,
    /// The volume does not have it any more.
    Gone,
}

impl Found {
    fn coming(self) -> Option<Layer> {
        match self {
            Found::Coming(layer) => Some(*layer),
            Found::Whole | Found::Gone => None,
        }
    }
}

/// Hears what is to come, opens it, and gives up everything else.
fn begin(store: &Store, socket: &UnixStream) -> Result<Begun> {
    // It can be started now alone.
    let carriers = Carriers::start(store.root())?;
    sandbox::give_up_network()?;
    let attempt = || "take a request: this command is started by \"sealblk attach\" alone";
    let mut lines = Lines::of_at_most(MAX_LINE);
    let none = || Error::new(Kind::Usage, "there is none").context(attempt());
    let line = lines.next(socket).context(attempt)?.ok_or_else(none)?;
    let Begin { volume, layers } =
        serde_json::from_slice(&line).map_err(|e| Error::of(Kind::Usage, e).context(attempt()))?;
    let secret = SecretFd::from_fd(lines.take_descriptor().ok_or_else(none)?)?.map()?;
    if secret.len() != layers.len() * BackupKeys::LEN {
        return Err(Error::new(Kind::Usage, "the keys are those of other layers").context(attempt()));
    }
    let catalog = store.catalog();
    let metadata = catalog.load(volume)?;
    let open = |(id, bytes): (&_, &[u8])| -> Result<Found> {
        let Some(record) = metadata.layers().iter().find(|layer| layer.id == *id) else {
            return Ok(Found::Gone);
        };
        let mut own = SecretMem::new(BackupKeys::LEN)?;
        on_scrubbed_stack(|| own.as_mut_slice().copy_from_slice(bytes));
        let opened = Layer::open(&catalog, record, BackupKeys::from_secret(own)?)?;
        Ok(opened.map_or(Found::Whole, |layer| Found::Coming(Box::new(layer))))
    };
    let layers =
        layers.iter().zip(secret.as_slice().chunks(BackupKeys::LEN)).map(open).collect::<Result<_>>()?;
    drop(secret);
    let mut events = store.events();
    if let Err(e) = events.keep_open() {
        log::warn!("{e}; this process will report no events");
    }
    let root = store.root();
    // The layers that it fills are open. When one is whole, it gets its name.
    let rules = [Rule::new(root.layers(), Access::Names), Rule::new(root.volumes(), Access::List)];
    let confinement = sandbox::confine_fetcher(&rules)?;
    log::debug!("the fetcher of {volume} is confined: {confinement}");
    Ok(Begun { carriers, events, volume, layers, lines })
}
