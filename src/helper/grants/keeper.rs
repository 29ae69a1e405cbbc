//! The keeper: a helper process that makes an attach's grants and retires them when the attach is over.
//!
//! It never sees a data key. The host process sends one line that says which keys it will use, and gets one
//! line with the grants' tokens. Then the keeper waits. Another line says which keys the volume still needs,
//! and is answered when the grants on others are retired. An empty one means the end of the attach, and is
//! answered when all are; the socket's end means the same where nobody is left to answer. So it needs nothing
//! of the host process, which is confined by then, and may be killed.

use crate::base::hardened::harden;
use crate::base::root::Root;
use crate::base::sync::Locked;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::VolumeId;
use crate::catalog::metadata::Metadata;
use crate::config::{Settings, shown_file};
use crate::helper;
use crate::helper::failure::WrittenFailure;
use crate::helper::grants::notes::{self, Note, Notes};
use crate::helper::grants::{create, retire, settle};
use crate::kms::patience::Patience;
use crate::kms::{self, Failure, Grant, KeyProvider, KmsError};
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The hidden subcommand.
pub const COMMAND: &str = "keep-grants";
/// The longest line in bytes: tokens have up to 8192 characters.
const MAX_LINE: usize = 1 << 20;
/// What the keeper may take beside the KMS's time.
const MARGIN: Duration = Duration::from_secs(30);

/// What is to be granted.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Order {
    volume: VolumeId,
    /// The volume's keys, in its order: provider and ARN.
    keys: Vec<(String, String)>,
    patience_ms: u64,
    /// Whether this is the only attach of the volume: what others have noted is left over then.
    alone: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
enum Answer {
    /// The grants' tokens, in the keys' order; none where no grant was to be made.
    Granted(Vec<Option<String>>),
    /// The KMS, or something on the way to it, refused.
    Refused(WrittenFailure),
    /// All grants that were to be are retired.
    Retired,
    /// Some are not.
    Left(String),
}

/// The host process's end. Dropped, it lets the keeper retire the grants by itself.
#[derive(Default)]
pub struct Keeper {
    socket: Option<UnixStream>,
    tokens: Vec<Option<String>>,
    /// Whether another host process has the keeper now.
    is_others: AtomicBool,
    asking: Mutex<()>,
}

impl Keeper {
    /// Has the grants made for an attach of the volume, where the settings want them. Whoever calls it has
    /// the volume, and is `alone`, or is to have it next.
    ///
    /// # Errors
    /// The KMS's refusal, or what went wrong on the way to it.
    pub fn start(
        root: &Root,
        settings: &Settings,
        metadata: &Metadata,
        patience: Patience,
        alone: bool,
    ) -> Result<Self, Failure> {
        // Without a grantee no provider has a grant to make: so no process is started to find that out.
        let wanted = settings.attach_grants && settings.grantee_principal.is_some();
        if !wanted {
            log::debug!(
                "no grant is made: attach-grants is off, or no grantee-principal is set in sealblk.toml"
            );
        }
        if alone {
            notes::warn_of_old(root);
        }
        let keys: Vec<(String, String)> = match wanted {
            true => keys_of(metadata),
            false => Vec::new(),
        };
        let left_behind = alone && !Notes::of(root)?.of_volume(metadata.id())?.is_empty();
        if keys.is_empty() && !left_behind {
            return Ok(Keeper::default());
        }
        let (socket, mut child) = helper::spawn(root, COMMAND)?;
        let time = patience.longest_call() * keys.len().max(1) as u32 + MARGIN;
        let patience_ms = patience.0.as_millis() as u64;
        let order = Order { volume: metadata.id(), keys, patience_ms, alone };
        let answer = socket.set_read_timeout(Some(time)).map_err(Error::from).and_then(|()| {
            wire::say(&socket, &order)?;
            hear(&mut Lines::of_at_most(MAX_LINE), &socket)
        });
        match answer {
            Ok(Some(Answer::Granted(tokens))) if !left_behind && tokens.iter().all(Option::is_none) => {
                // There was nothing to make, and nothing is left for it to do.
                child.wait().map_err(Error::from)?;
                Ok(Keeper::default())
            }
            Ok(Some(Answer::Granted(tokens))) => {
                // From now on what it may take is what retiring takes.
                let time = crate::helper::grants::RETIRING.longest_call() * tokens.len().max(1) as u32;
                socket.set_read_timeout(Some(time)).map_err(Error::from)?;
                Ok(Keeper { socket: Some(socket), tokens, ..Keeper::default() })
            }
            Ok(Some(Answer::Refused(refusal))) => {
                drop(socket);
                // It has nothing left to do.
                child.wait().map_err(Error::from)?;
                Err(refusal.into())
            }
            outcome => {
                // It did not keep to the protocol, or did not answer: whatever it is doing, it shall stop.
                let _ = child.kill();
                let status = child.wait().map_err(Error::from)?;
                let problem = outcome.err().unwrap_or_else(|| Error::new(Kind::Other, "it gave no answer"));
                Err(problem.context(format!("the {COMMAND} helper ({status})")).into())
            }
        }
    }

    /// A keeper that another host process has started, by its end of the socket: that process's until
    /// [`Keeper::keep`].
    pub(crate) fn of_another(socket: UnixStream) -> Self {
        let tokens = vec![Some(String::new())];
        Keeper { socket: Some(socket), tokens, is_others: AtomicBool::new(true), ..Keeper::default() }
    }

    /// This process's end of the keeper's socket, if the keeper has grants to retire.
    pub(crate) fn socket(&self) -> Option<&UnixStream> {
        self.socket.as_ref().filter(|_| self.tokens.iter().any(Option::is_some))
    }

    /// Whether the keeper is another process's.
    pub(crate) fn is_of_another(&self) -> bool {
        self.is_others.load(Ordering::Relaxed)
    }

    /// The keeper is this process's from now on, and no other's.
    pub(crate) fn keep(&self) {
        self.is_others.store(false, Ordering::Relaxed);
    }

    /// The keeper, whose socket was passed to another host process, is that one's from now on.
    pub(crate) fn leave(&self) {
        self.is_others.store(true, Ordering::Relaxed);
    }

    /// The token for the volume's key of that place, if there is one.
    pub fn token(&self, key: usize) -> Option<&str> {
        self.tokens.get(key)?.as_deref()
    }

    /// Has the grants retired, and waits for that. What cannot be retired now is logged: it will be later.
    pub fn retire(&self) {
        self.ask(|mut socket| socket.write_all(b"\n"));
    }

    /// Has the grants on keys retired that the volume does not need any more, and waits for that.
    pub fn retire_others_than_of(&self, volume: &Metadata) {
        let needed = keys_of(volume);
        self.ask(|socket| wire::say(socket, &needed));
    }

    fn ask(&self, order: impl FnOnce(&UnixStream) -> std::io::Result<()>) {
        if self.is_of_another() {
            return;
        }
        let Some(socket) = self.socket() else { return };
        // One question at a time: the answers do not say which they are to.
        let _one = self.asking.locked();
        let heard =
            order(socket).map_err(Error::from).and_then(|()| hear(&mut Lines::of_at_most(MAX_LINE), socket));
        let why = match heard {
            Ok(Some(Answer::Retired)) => return,
            Ok(Some(Answer::Left(why))) => why,
            Ok(_) => "its keeper has ended".into(),
            Err(e) => e.to_string(),
        };
        log::warn!(
            "the grant of this attach is not retired: {why}; the next attach or \"sealblk gc\" does it"
        );
    }
}

/// The keeper's side: the whole life of the process.
///
/// # Errors
/// Only when the other side could not even be told.
pub fn keep(root: &Root) -> Result<()> {
    let socket = helper::begin()?;
    let mut lines = Lines::of_at_most(MAX_LINE);
    let alone = "this command is started by \"sealblk attach\" alone";
    let order = hear(&mut lines, &socket).context(|| alone)?;
    let order: Order = order.ok_or_else(|| Error::new(Kind::Usage, alone))?;
    let old = if order.alone { Notes::of(root)?.of_volume(order.volume)? } else { Vec::new() };
    let mut made = Vec::new();
    let granted = grant_all(root, &order, &old, &mut made);
    // The terminal's and the service manager's signals are for the host process; its end
    // is what ends this one.
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().context(|| "block signals")?;
    helper::outlive_parent()?;
    let tokens = match granted {
        Ok(tokens) => tokens,
        Err(refusal) => {
            if let Err(e) = retire_made(root, &made) {
                log::warn!("{e}");
            }
            return Ok(wire::say(&socket, &Answer::Refused(refusal.into()))?);
        }
    };
    // Whoever has gone meanwhile is found below.
    let _ = wire::say(&socket, &Answer::Granted(tokens));
    for note in old.iter().filter(|note| made.iter().all(|(of, _)| of.id != note.id)) {
        match retire(root, note) {
            Ok(()) => log::info!("retired the grant of an attach since {} that did not end well", note.since),
            Err(e) => log::warn!("a grant of an attach since {} is not retired: {e}", note.since),
        }
    }
    if made.is_empty() {
        return Ok(());
    }
    let asked = keep_until_the_end(root, &socket, &mut lines, &mut made);
    let answer = match retire_made(root, &made) {
        Ok(()) => Answer::Retired,
        Err(e) => Answer::Left(e.to_string()),
    };
    match (asked, answer) {
        (true, answer) => Ok(wire::say(&socket, &answer)?),
        (false, Answer::Left(why)) => {
            log::warn!("{}: the grant of its attach is not retired: {why}", order.volume);
            Ok(())
        }
        (false, _) => Ok(()),
    }
}

/// Retires grants that are not needed any more, until an empty line or the end of the socket; returns
/// whether there was such a line.
fn keep_until_the_end(
    root: &Root,
    socket: &UnixStream,
    lines: &mut Lines,
    made: &mut Vec<(Note, Grant)>,
) -> bool {
    loop {
        let Ok(Some(line)) = lines.next(socket) else { return false };
        let Ok(needed) = serde_json::from_slice::<Vec<(String, String)>>(&line) else { return true };
        let is_needed =
            |note: &Note| needed.iter().any(|(p, key)| (p, key) == (&note.provider, &note.key_id));
        let others: Vec<_> = made.extract_if(.., |(note, _)| !is_needed(note)).collect();
        let answer = match retire_made(root, &others) {
            Ok(()) => Answer::Retired,
            Err(e) => Answer::Left(e.to_string()),
        };
        // Whoever has gone meanwhile is found above.
        let _ = wire::say(socket, &answer);
    }
}

/// The KMS keys that wrap a volume's data keys: provider and ARN.
fn keys_of(volume: &Metadata) -> Vec<(String, String)> {
    volume.keys().iter().map(|k| (k.provider.clone(), k.wrapped.key_id.clone())).collect()
}

/// The tokens. Every grant that was made is in `made` afterwards, also where another one failed.
fn grant_all(
    root: &Root,
    order: &Order,
    old: &[Note],
    made: &mut Vec<(Note, Grant)>,
) -> Result<Vec<Option<String>>, Failure> {
    let patience = Patience(Duration::from_millis(order.patience_ms));
    let mut tokens: Vec<Option<String>> = Vec::new();
    for (n, (provider, key)) in order.keys.iter().enumerate() {
        if let Some(same) = order.keys[..n].iter().position(|k| (&k.0, &k.1) == (provider, key)) {
            tokens.push(tokens[same].clone());
            continue;
        }
        let refused = |e: KmsError| refusal(provider, key, e);
        let opened =
            kms::open_patient_provider(harden()?, root, provider, Some(patience)).map_err(refused)?;
        let Some(grantee) = opened.capabilities().grantee else {
            log::debug!("no grant is made for {key}: grantee-principal is nobody at the {provider} provider");
            tokens.push(None);
            continue;
        };
        let wanted = Note::new(root, order.volume, provider, key, &grantee);
        let note = old.iter().find(|old| old.could_be(&wanted)).cloned().unwrap_or(wanted);
        let grant = make(root, &*opened, note, made)?.map_err(refused)?;
        tokens.push(grant.token);
    }
    Ok(tokens)
}

/// Makes one grant, noted before and after.
fn make(
    root: &Root,
    provider: &dyn KeyProvider,
    mut note: Note,
    made: &mut Vec<(Note, Grant)>,
) -> Result<Result<Grant, KmsError>, Error> {
    let notes = Notes::of(root)?;
    notes.write(&note)?;
    match create(provider, &note) {
        Ok(grant) => {
            note.grant = Some(grant.id.clone());
            made.push((note.clone(), grant.clone()));
            notes.write(&note)?;
            Ok(Ok(grant))
        }
        // Whether it was made nobody knows; the note says that it may have been.
        Err(e @ (KmsError::Transport(_) | KmsError::Unavailable(_))) => Ok(Err(e)),
        Err(e) => {
            notes.remove(&note)?;
            Ok(Err(e))
        }
    }
}

/// Retires what [`grant_all`] has made; goes on after a failure, and returns the first.
fn retire_made(root: &Root, made: &[(Note, Grant)]) -> Result<()> {
    let mut outcome = Ok(());
    for (note, grant) in made {
        outcome = outcome.and(retire_made_one(root, note, grant));
    }
    outcome
}

/// By its token at first: soon after its making not all of the KMS knows the grant by its id.
fn retire_made_one(root: &Root, note: &Note, grant: &Grant) -> Result<()> {
    let patience = notes::patience(root, crate::helper::grants::RETIRING);
    let provider = kms::open_patient_provider(harden()?, root, &note.provider, Some(patience))?;
    let retired = match provider.retire_grant(grant) {
        // Tokens age.
        Err(KmsError::Other(kms::Exception::InvalidGrantToken, _)) => {
            provider.retire_grant(&Grant { token: None, ..grant.clone() })
        }
        outcome => outcome,
    };
    settle(root, note, retired)
}

fn refusal(provider: &str, key: &str, e: KmsError) -> Failure {
    let hint = match &e {
        KmsError::AccessDenied(_)
        | KmsError::NotAuthenticated(_)
        | KmsError::Unsupported(_)
        | KmsError::Other(..) => format!(
            "; where this host may not make grants, set attach-grants = false in {}",
            shown_file().display()
        ),
        _ => String::new(),
    };
    let failure = Failure::kms(e, provider, key).context("make a grant for this attach");
    let message = format!("{}{hint}", failure.error);
    Failure { error: failure.error.reworded(message), ..failure }
}

/// The next line; none at the end of the socket.
fn hear<T: for<'de> Deserialize<'de>>(lines: &mut Lines, socket: &UnixStream) -> Result<Option<T>> {
    let Some(line) = lines.next(socket)? else { return Ok(None) };
    serde_json::from_slice(&line)
        .map(Some)
        .map_err(|e| Error::of(Kind::Other, e).context("it said what is not readable"))
}
