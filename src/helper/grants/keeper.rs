//! The keeper: a helper process that makes an attach's grants and retires them when the attach is over.
//!
//! It never sees a data key. The host process sends one line that says for which volume. Then, for each KMS
//! key that it is going to ask, one at a time, it sends a line and gets one with the grant's token, or the
//! KMS's refusal: where several KMS keys wrap a data key, a grant is made on those alone that are asked.
//! Another line says which keys the volume still needs, and is answered when the grants on others are
//! retired; the first such line ends the making. An empty one means the end of the attach, and is answered
//! when all are retired; the socket's end means the same where nobody is left to answer. So it needs nothing
//! of the host process, which is confined by then, and may be killed.

use crate::base::child;
use crate::base::hardened::harden;
use crate::base::root::Root;
use crate::base::sync::Locked;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result};
use crate::catalog::VolumeId;
use crate::catalog::metadata::{KeyRecord, Metadata};
use crate::catalog::slots::KeySlot;
use crate::config::{Settings, shown_file};
use crate::helper::failure::WrittenFailure;
use crate::helper::grants::notes::{self, Note, Notes};
use crate::helper::grants::{create, retire, settle};
use crate::kms::patience::Patience;
use crate::kms::{self, Failure, Grant, KeyProvider, KmsError, KmsKey};
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The hidden subcommand.
pub const COMMAND: &str = "keep-grants";
/// The longest line in bytes: tokens have up to 8192 characters.
const MAX_LINE: usize = 1 << 20;
/// What the keeper may take beside the KMS's time.
const MARGIN: Duration = Duration::from_secs(30);

/// For whom there shall be grants.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Order {
    volume: VolumeId,
    /// Whether this is the only attach of the volume: what others have noted is left over then.
    alone: bool,
}

/// A grant that is to be made.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Wanted {
    /// On this KMS key.
    key: KmsKey,
    patience_ms: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
enum Answer {
    /// The grant's token; none where no grant was to be made.
    Granted(Option<String>),
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
    /// Whether there are grants to retire.
    has_grants: bool,
    /// Whether another host process has the keeper now.
    is_others: AtomicBool,
    asking: Mutex<()>,
}

/// The making of the grants of one attach: it has begun, and its keeper waits to hear on which keys.
pub struct Granting {
    keeper: Option<(UnixStream, Child)>,
    /// What was answered for each key.
    granted: Vec<(KmsKey, Option<String>)>,
    /// Whether the settings want grants.
    is_wanted: bool,
    /// Whether earlier attaches have left grants.
    left_behind: bool,
}

impl Granting {
    /// Begins for an attach of the volume, where the settings want grants, or earlier attaches have left
    /// some. Whoever calls it has the volume, and is `alone`, or is to have it next.
    ///
    /// # Errors
    /// What keeps the keeper from being started.
    pub fn begin(root: &Root, settings: &Settings, metadata: &Metadata, alone: bool) -> Result<Self> {
        // Without a grantee no provider has a grant to make: so no process is started to find that out.
        let is_wanted = settings.attach_grants && settings.grantee_principal.is_some();
        if !is_wanted {
            log::debug!(
                "no grant is made: attach-grants is off, or no grantee-principal is set in sealblk.toml"
            );
        }
        if alone {
            notes::warn_of_old(root);
        }
        let left_behind = alone && !Notes::of(root)?.of_volume(metadata.id())?.is_empty();
        let is_needed = left_behind || (is_wanted && !metadata.keys().is_empty());
        let keeper = is_needed.then(|| {
            let (socket, child) = child::spawn(root, COMMAND)?;
            wire::say(&socket, &Order { volume: metadata.id(), alone })?;
            Ok::<_, Error>((socket, child))
        });
        Ok(Granting { keeper: keeper.transpose()?, granted: Vec::new(), is_wanted, left_behind })
    }

    /// Has a grant made on this key, once, if the settings want grants, and its KMS has some. Returns the
    /// grant's token.
    ///
    /// # Errors
    /// The KMS's refusal, or what went wrong on the way to it.
    pub fn grant(&mut self, key: &KmsKey, patience: Patience) -> Result<Option<String>, Failure> {
        if let Some((_, token)) = self.granted.iter().find(|(granted, _)| granted == key) {
            return Ok(token.clone());
        }
        let Some((socket, _)) = self.keeper.as_ref().filter(|_| self.is_wanted) else { return Ok(None) };
        let time = patience.longest_call() + MARGIN;
        let wanted = Wanted { key: key.clone(), patience_ms: patience.0.as_millis() as u64 };
        let answer = socket.set_read_timeout(Some(time)).map_err(Error::from).and_then(|()| {
            wire::say(socket, &wanted)?;
            hear(&mut Lines::of_at_most(MAX_LINE), socket)
        });
        match answer {
            Ok(Some(Answer::Granted(token))) => {
                self.granted.push((key.clone(), token.clone()));
                Ok(token)
            }
            Ok(Some(Answer::Refused(refusal))) => Err(refusal.into()),
            outcome => {
                // It did not keep to the protocol, or did not answer: whatever it is doing, it shall stop.
                let problem = outcome.err().unwrap_or_else(|| Error::new(Kind::Other, "it gave no answer"));
                Err(self.give_up(problem)?.into())
            }
        }
    }

    /// Kills the keeper, and says with what it ended.
    fn give_up(&mut self, problem: Error) -> Result<Error> {
        let Some((_, mut child)) = self.keeper.take() else { return Ok(problem) };
        let _ = child.kill();
        let status = child.wait()?;
        Ok(problem.context(format!("the {COMMAND} helper ({status})")))
    }

    /// The grants are made that are needed: those on `used`. Others, which no data key came by, are retired.
    ///
    /// # Errors
    /// Where the keeper does not answer.
    pub fn end(mut self, used: &[KmsKey]) -> Result<Keeper> {
        let Some((socket, mut child)) = self.keeper.take() else { return Ok(Keeper::default()) };
        let has_grants = self.granted.iter().any(|(key, token)| token.is_some() && used.contains(key));
        let is_any = self.granted.iter().any(|(_, token)| token.is_some());
        if !is_any && !self.left_behind {
            // There was nothing to make, and nothing is left for it to do.
            drop(socket);
            child.wait()?;
            return Ok(Keeper::default());
        }
        // From now on what it may take is what retiring takes.
        let time = crate::helper::grants::RETIRING.longest_call() * self.granted.len().max(1) as u32;
        socket.set_read_timeout(Some(time))?;
        let keeper = Keeper { socket: Some(socket), has_grants, ..Keeper::default() };
        keeper.retire_others_than(used);
        if !has_grants && !self.left_behind {
            // Those that were made are retired, and nothing is left for it to do.
            drop(keeper);
            child.wait()?;
            return Ok(Keeper::default());
        }
        Ok(keeper)
    }

    /// The attach has failed: all grants that were made are retired when this returns, as far as that can be.
    pub fn cancel(mut self) {
        let Some((socket, mut child)) = self.keeper.take() else { return };
        // What is left over of earlier attaches is for the next one.
        drop(socket);
        if let Err(e) = child.wait() {
            log::warn!("the {COMMAND} helper: {e}");
        }
    }
}

impl Keeper {
    /// A keeper that another host process has started, by its end of the socket: that process's until
    /// [`Keeper::keep`].
    pub(crate) fn of_another(socket: UnixStream) -> Self {
        Keeper {
            socket: Some(socket),
            has_grants: true,
            is_others: AtomicBool::new(true),
            ..Keeper::default()
        }
    }

    /// This process's end of the keeper's socket, if the keeper has grants to retire.
    pub(crate) fn socket(&self) -> Option<&UnixStream> {
        self.socket.as_ref().filter(|_| self.has_grants)
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

    /// Has the grants retired, and waits for that. What cannot be retired now is logged: it will be later.
    pub fn retire(&self) {
        self.ask(|mut socket| socket.write_all(b"\n"));
    }

    /// Has the grants on keys retired that the volume does not need any more, and waits for that.
    pub fn retire_others_than_of(&self, volume: &Metadata) {
        let keys: Vec<KmsKey> =
            volume.keys().iter().flat_map(KeyRecord::slots).map(KeySlot::kms_key).collect();
        if self.socket().is_some() {
            self.retire_others_than(&keys);
        }
    }

    fn retire_others_than(&self, keys: &[KmsKey]) {
        // A keeper of an earlier version takes pairs.
        let needed: Vec<(&str, &str)> = keys.iter().map(|key| (&*key.provider, &*key.key_id)).collect();
        self.ask_at(self.socket.as_ref(), |socket| wire::say(socket, &needed));
    }

    fn ask(&self, order: impl FnOnce(&UnixStream) -> std::io::Result<()>) {
        self.ask_at(self.socket(), order);
    }

    fn ask_at(&self, socket: Option<&UnixStream>, order: impl FnOnce(&UnixStream) -> std::io::Result<()>) {
        if self.is_of_another() {
            return;
        }
        let Some(socket) = socket else { return };
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
    let socket = child::begin()?;
    let mut lines = Lines::of_at_most(MAX_LINE);
    let alone = "this command is started by \"sealblk attach\" alone";
    let order = hear(&mut lines, &socket).context(|| alone)?;
    let order: Order = order.ok_or_else(|| Error::new(Kind::Usage, alone))?;
    let old = if order.alone { Notes::of(root)?.of_volume(order.volume)? } else { Vec::new() };
    let mut made = Vec::new();
    let needed = grant_all(root, &order, &old, &socket, &mut lines, &mut made);
    outlive()?;
    let Some(needed) = needed else {
        // The attach has failed.
        return retire_made(root, &made).or_else(|e| {
            log::warn!("{}: the grant of its attach is not retired: {e}", order.volume);
            Ok(())
        });
    };
    retire_others(root, &socket, &needed, &mut made);
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

/// There may be something to retire, whatever becomes of the host process: its end is what ends this process.
/// The terminal's and the service manager's signals are for that one.
fn outlive() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().context(|| "block signals")?;
    child::outlive_parent()
}

/// KMS keys that the volume needs: provider and ARN.
type Needed = Vec<(String, String)>;

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
        let Ok(needed) = serde_json::from_slice::<Needed>(&line) else { return true };
        retire_others(root, socket, &needed, made);
    }
}

/// Retires those that were made on keys which are not `needed`, and answers.
fn retire_others(root: &Root, socket: &UnixStream, needed: &Needed, made: &mut Vec<(Note, Grant)>) {
    let is_needed = |note: &Note| needed.iter().any(|(p, key)| (p, key) == (&note.provider, &note.key_id));
    let others: Vec<_> = made.extract_if(.., |(note, _)| !is_needed(note)).collect();
    let answer = match retire_made(root, &others) {
        Ok(()) => Answer::Retired,
        Err(e) => Answer::Left(e.to_string()),
    };
    // Whoever has gone meanwhile is found by who hears the next line.
    let _ = wire::say(socket, &answer);
}

/// Makes the grants that are asked for, each when it is, and answers; returns the keys that the volume needs
/// when the making is over, and none where the attach has failed. Every grant that was made is in `made`
/// afterwards.
fn grant_all(
    root: &Root,
    order: &Order,
    old: &[Note],
    socket: &UnixStream,
    lines: &mut Lines,
    made: &mut Vec<(Note, Grant)>,
) -> Option<Needed> {
    // Those of which nobody knows whether they were made: the same request again is the same grant.
    let mut open = old.to_vec();
    loop {
        let line = lines.next(socket).ok()??;
        if let Ok(needed) = serde_json::from_slice(&line) {
            return Some(needed);
        }
        let wanted: Wanted = serde_json::from_slice(&line).ok()?;
        let is_first = made.is_empty();
        let answer = match grant(root, order.volume, &wanted, &mut open, made) {
            Ok(token) => Answer::Granted(token),
            Err(refusal) => Answer::Refused(refusal.into()),
        };
        if is_first && !made.is_empty() {
            outlive().ok()?;
        }
        // Whoever has gone meanwhile is found by the next line.
        let _ = wire::say(socket, &answer);
    }
}

/// The token; none where no grant is to be made.
fn grant(
    root: &Root,
    volume: VolumeId,
    Wanted { key: KmsKey { provider, key_id }, patience_ms }: &Wanted,
    open: &mut Vec<Note>,
    made: &mut Vec<(Note, Grant)>,
) -> Result<Option<String>, Failure> {
    let patience = Patience(Duration::from_millis(*patience_ms));
    let refused = |e: KmsError| refusal(provider, key_id, e);
    let opened = kms::open_patient_provider(harden()?, root, provider, Some(patience)).map_err(refused)?;
    let Some(grantee) = opened.capabilities().grantee else {
        log::debug!("no grant is made for {key_id}: grantee-principal is nobody at the {provider} provider");
        return Ok(None);
    };
    let wanted = Note::new(root, volume, provider, key_id, &grantee);
    let note = open.iter().find(|open| open.could_be(&wanted)).cloned().unwrap_or_else(|| {
        open.push(wanted.clone());
        wanted
    });
    Ok(make(root, &*opened, note, made)?.map_err(refused)?.token)
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
