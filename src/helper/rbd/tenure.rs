//! Who writes an image: one client, and nobody who thinks that it still did.
//!
//! Two things together say who that is:
//!
//! - The image's **exclusive lock**, which is Ceph's. Another client takes it from one that is dead, or
//!   that the operator says is, only by breaking it: from that moment on, no OSD does anything for the
//!   client that had it (it is on the cluster's blocklist), whatever is still on its way. So a client's own
//!   writes never come too late.
//! - The **tenure**, a random number in the image's metadata, which whoever has the lock writes there before
//!   it writes anything else. A process that has an image opens it again with another client when the one
//!   that it had has died, and has requests then that wait to be sent again. If another process has had the
//!   lock in between, these would land on top of what that one has written; the lock, which may be free again
//!   by then, does not tell. So who opens an image *again* must find exactly the tenure that it had, under
//!   the lock. Otherwise the image is lost to that process for good.
//!
//! A process can **lend** the image to another one, which goes on with the same tenure (`host::upgrade`): it
//! has its own client let go of the lock, with everything answered and durable, and asks for nothing any
//! more. What it is given back it takes again in the way above: also from the other one's client, if that is
//! there still. The other process takes the lock once, from nobody; what it loses then it does not take again
//! before the image is its own. Nobody else takes an image that is lent, unless its host is seen, or said by
//! the operator, to be dead.
//!
//! The tenure names its client as well. Whoever finds one that was not taken away in peace puts that
//! client on the blocklist, for as long as a host may be cut off: also where somebody has broken the
//! lock by hand, without that.
//!
//! The lock is broken where its client is known to be dead: one of this keeper's own that has ended; one that
//! has given no sign of life for 30 seconds (Ceph's time for a watch); one of a process on this host that has
//! ended; or where the operator says so (`--break-lock`). In all other cases whoever wants it is refused,
//! with the name of the holder.
//!
//! What is in the metadata is a claim: whoever can write there can as well take the lock,
//! or delete the image.
#![forbid(unsafe_code)]

use super::image::Image;
use crate::base::{Context, Error, Kind, Result, printable};
use crate::catalog::lock::Holder;
use serde::{Deserialize, Serialize};
use std::ffi::CStr;
use std::thread::sleep;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The key of the tenure in an image's metadata.
const KEY: &CStr = c"sealblk";
/// The version of what stands there.
const FORMAT: u32 = 1;
/// How long to wait for a client that is about to write its tenure, or to end.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(250);

/// What stands in an image's metadata while somebody has it for writing.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tenure {
    format: u32,
    tenure: Uuid,
    /// The volume that is attached, if one is.
    volume: Option<String>,
    /// The process that has the image: the one that has started the client, not the client itself.
    holder: Holder,
    /// The address of the client, as Ceph shows it.
    client: String,
}

/// On what grounds an image is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Way {
    /// It is free, or whoever had it is dead.
    New,
    /// It was this process's by this tenure, and must be still.
    Again,
    /// The process that has it by this tenure lends it.
    Lent,
}

/// What a server is to take an image for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Claim {
    pub(super) tenure: Tenure,
    pub(super) way: Way,
    /// The operator says that whoever has the lock is dead.
    pub(super) break_lock: bool,
    /// Addresses of clients of the same keeper, which have ended.
    pub(super) ended: Vec<String>,
}

/// Why an image could not be taken.
pub(super) enum Refusal {
    /// Not now.
    Failed(Error),
    /// Never again by this tenure.
    Lost(String),
}

impl<E: Into<Error>> From<E> for Refusal {
    fn from(e: E) -> Self {
        Refusal::Failed(e.into())
    }
}

impl Tenure {
    /// A new one, of the process `holder`.
    pub(super) fn new(holder: Holder, volume: Option<String>) -> Self {
        Tenure { format: FORMAT, tenure: Uuid::new_v4(), volume, holder, client: String::new() }
    }

    /// The one of this number, for the process `holder`, which another process has until now.
    pub(super) fn of_another(number: Uuid, holder: Holder, volume: Option<String>) -> Self {
        Tenure { tenure: number, ..Tenure::new(holder, volume) }
    }

    /// What tells it from all others.
    pub(super) fn number(&self) -> Uuid {
        self.tenure
    }

    /// Whether it is on its way from one process to another, and no client has the image.
    fn is_lent(&self) -> bool {
        self.client.is_empty()
    }

    /// Whose it is, in words.
    fn words(&self) -> String {
        let Tenure { holder, volume, .. } = self;
        let host = holder.host.as_ref().map_or_else(|| "an unknown host".into(), |host| host.name.clone());
        let volume =
            volume.as_ref().map_or_else(String::new, |volume| format!(", which has {volume} attached"));
        let words = format!("process {} on the host {host}{volume}, since {}", holder.pid, holder.since);
        printable::line(&words).into_owned()
    }

    fn is(&self, other: &Tenure) -> bool {
        self.tenure == other.tenure
    }

    /// Whether both are the same process's, which has an image once at a time.
    fn is_of_process_of(&self, other: &Tenure) -> bool {
        let of = |holder: &Holder| (holder.pid, holder.start_time, holder.host.clone());
        of(&self.holder) == of(&other.holder)
    }
}

/// Takes the lock on `image`, and puts the tenure of `claim` there. `has_ended` tells whether a process is
/// one of this host that is seen to have ended; and whether it is seen to run.
///
/// # Errors
/// `Busy`, with the holder's name; those of Ceph; that the image is lost to this tenure.
pub(super) fn take(
    image: &Image,
    claim: &Claim,
    look_at: &mut dyn FnMut(&Holder) -> Result<Seen>,
) -> std::result::Result<(), Refusal> {
    let until = Instant::now() + PATIENCE;
    let mut is_broken = false;
    loop {
        let had = match image.owner().context(|| "ask who has the image's lock")? {
            None => free(image, claim, look_at)?,
            Some(owner) if owner == image.address() => Had::Us,
            Some(owner) => of(image, claim, owner, look_at)?,
        };
        match had {
            Had::Nobody | Had::Us => match image.lock() {
                Ok(()) => break,
                Err(e) if is_anothers(&e) && Instant::now() < until => sleep(LOOK),
                Err(e) => return Err(e).context(|| "take the image's lock")?,
            },
            Had::Dead(owner) => match image.break_lock(&owner) {
                // For an hour, by librbd; and so for as long as it takes.
                Ok(()) => {
                    is_broken = true;
                    image.refuse(&owner).map_err(|e| explained(&e))?;
                }
                // It was released, or another one has it by now.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EBUSY)) => {}
                Err(e) => return Err(explained(&e).into()),
            },
            Had::Living(_) if claim.way != Way::New && Instant::now() < until => sleep(LOOK),
            Had::Living(refusal) => return Err(refusal.into()),
        }
        if Instant::now() >= until + PATIENCE {
            return Err(Error::new(Kind::Busy, "others take the image's lock all the time").into());
        }
    }
    let taken = put(image, claim, is_broken, look_at);
    if taken.is_err() {
        let _ = image.unlock();
    }
    taken
}

/// Who has the lock.
enum Had {
    Nobody,
    Us,
    Dead(String),
    Living(Error),
}

/// What one sees of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Seen {
    /// It runs, on this host.
    Running,
    /// It was one of this host, and has ended.
    Ended,
    /// It is none of this host, or cannot be seen.
    Nothing,
}

/// What is to be done about an image of which nobody has the lock.
fn free(
    image: &Image,
    claim: &Claim,
    look_at: &mut dyn FnMut(&Holder) -> Result<Seen>,
) -> std::result::Result<Had, Refusal> {
    if claim.way != Way::New || claim.break_lock {
        return Ok(Had::Nobody);
    }
    match read(image)? {
        Some(tenure) if tenure.is_lent() && look_at(&tenure.holder)? != Seen::Ended => {
            let message = format!(
                "{} has the image, and hands it over to another process at this moment. If that host is \
                 dead, --break-lock takes the image",
                tenure.words()
            );
            Ok(Had::Living(Error::new(Kind::Busy, message)))
        }
        _ => Ok(Had::Nobody),
    }
}

/// What is to be done about another client that has the lock.
fn of(
    image: &Image,
    claim: &Claim,
    owner: String,
    look_at: &mut dyn FnMut(&Holder) -> Result<Seen>,
) -> std::result::Result<Had, Refusal> {
    if claim.ended.contains(&owner) {
        return Ok(Had::Dead(owner));
    }
    let tenure = read(image)?;
    if claim.way != Way::New && !tenure.as_ref().is_some_and(|it| it.is(&claim.tenure)) {
        return Err(lost(tenure.as_ref()));
    }
    // A client of this process's, which has another keeper by now; or of one that was lent the image, and has
    // not kept it.
    if claim.way == Way::Again && tenure.as_ref().is_some_and(|it| it.client == owner) {
        return Ok(Had::Dead(owner));
    }
    if !image.is_watched_by(&owner).context(|| "ask who gives signs of life")? {
        return Ok(Had::Dead(owner));
    }
    // An attach that goes on takes it from nobody who may be alive.
    if claim.way == Way::New {
        let seen = tenure.as_ref().map(|it| look_at(&it.holder)).transpose()?;
        if seen == Some(Seen::Ended) || claim.break_lock {
            return Ok(Had::Dead(owner));
        }
    }
    let address = printable::line(&owner).into_owned();
    Ok(Had::Living(busy(tenure.as_ref(), &format!("its client {address} gives signs of life"))))
}

/// Puts the tenure there, under the lock, which was taken from somebody dead if it `is_broken`.
fn put(
    image: &Image,
    claim: &Claim,
    is_broken: bool,
    look_at: &mut dyn FnMut(&Holder) -> Result<Seen>,
) -> std::result::Result<(), Refusal> {
    let there = read(image)?;
    let is_ours = there.as_ref().is_some_and(|there| there.is(&claim.tenure));
    if claim.way != Way::New && !is_ours {
        return Err(lost(there.as_ref()));
    }
    if let Some(there) = &there
        && !is_ours
        && !is_broken
        && !claim.break_lock
        && !there.is_of_process_of(&claim.tenure)
        && look_at(&there.holder)? == Seen::Running
    {
        // Its client has died, and another one is on its way.
        return Err(busy(Some(there), "it takes the lock again at this moment").into());
    }
    if let Some(before) = there.map(|there| there.client).filter(|client| is_address(client)) {
        image.refuse(&before).map_err(|e| explained(&e))?;
    }
    let tenure = Tenure { client: image.address().to_owned(), ..claim.tenure.clone() };
    let text = serde_json::to_string(&tenure).map_err(std::io::Error::from)?;
    image.set_value(KEY, Some(&text)).context(|| "write into the image's metadata")?;
    Ok(())
}

/// Whether it reads as the address of a client, which others have written.
pub(super) fn is_address(text: &str) -> bool {
    let number = text.rsplit_once('/').map_or("", |(_, number)| number);
    let is_known = |c: char| c.is_ascii_hexdigit() || matches!(c, '.' | ':' | '[' | ']' | '/');
    text.contains(':') && text.chars().all(is_known) && number.parse::<u64>().is_ok()
}

/// Lends the image to another process of this tenure. No client is named any more: whoever takes the image
/// need not keep one away.
pub(super) fn lend(image: &Image, tenure: Tenure) {
    let lent = Tenure { client: String::new(), ..tenure };
    if let Ok(text) = serde_json::to_string(&lent)
        && image.set_value(KEY, Some(&text)).is_ok()
    {
        let _ = image.unlock();
    }
}

/// Gives the image back: the tenure is over, and then the lock is free.
pub(super) fn leave(image: &Image) {
    if image.set_value(KEY, None).is_ok() {
        let _ = image.unlock();
    }
}

/// What stands in the image's metadata. What is no tenure counts as somebody else's.
fn read(image: &Image) -> Result<Option<Tenure>> {
    let text = image.value(KEY).context(|| "read the image's metadata")?;
    Ok(text.and_then(|text| serde_json::from_str::<Tenure>(&text).ok()).filter(|it| it.format == FORMAT))
}

fn is_anothers(e: &std::io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EROFS | libc::EBUSY | libc::EAGAIN))
}

fn busy(tenure: Option<&Tenure>, why: &str) -> Error {
    let who = tenure.map_or_else(|| "another client of Ceph".into(), Tenure::words);
    let message = format!(
        "{who} has the image, and {why}. Detach the volume there. If that host is dead, its lock can be \
         taken 30 seconds after its last sign of life; --break-lock takes it at once, and Ceph refuses \
         whatever that host still writes"
    );
    Error::new(Kind::Busy, message)
}

fn lost(tenure: Option<&Tenure>) -> Refusal {
    Refusal::Lost(match tenure {
        Some(tenure) => format!("{} has taken the image meanwhile", tenure.words()),
        None => "another host has taken the image meanwhile, and given it back".into(),
    })
}

fn explained(e: &std::io::Error) -> Error {
    let hint = match e.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "; the caps of this user have to allow it to blocklist others (mon 'profile rbd', see \
             docs/ceph.md)"
        }
        _ => "",
    };
    Error::new(Kind::Other, format!("keep the client away that had the image: {e}{hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_address_of_a_client_is_not_put_on_a_blocklist() {
        for address in ["127.0.0.1:0/2410958529", "[2001:db8::1]:0/7"] {
            assert!(is_address(address), "{address}");
        }
        for other in ["", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:0/", "a host:0/1", "1.2.3.4:0/1\", \"x"] {
            assert!(!is_address(other), "{other}");
        }
    }
}
