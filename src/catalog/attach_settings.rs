//! What an attach of a volume takes where its own arguments do not say otherwise: limits, a serial, how many
//! queues.
//!
//! They stand in the store's ledger, in an entry of their own: commands alone set them, and they can be
//! changed while the volume is attached.

use crate::base::{Error, Kind, Result};
use crate::catalog::ledger::{Doubt, Facts};
use crate::catalog::store_locks::RecordsLock;
use crate::catalog::{Catalog, VolumeId};
use serde::{Deserialize, Serialize};

/// The most queues that a volume can have.
pub const MAX_QUEUES: u16 = 64;
/// The longest serial in bytes: what virtio has room for.
pub const MAX_SERIAL: usize = 20;

/// What attaches of a volume take. Where nothing was set, an attach has its own default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachSettings {
    /// Requests a second; 0: no limit.
    pub iops: Option<u64>,
    /// Bytes a second; 0: no limit.
    pub throughput: Option<u64>,
    /// For how many milliseconds' worth of the limits an idle volume saves up.
    pub burst_ms: Option<u64>,
    /// The disk's serial as the guest sees it.
    pub serial: Option<String>,
    /// How many queues the guest may use.
    pub queues: Option<u16>,
}

impl AttachSettings {
    /// Looks whether an attach could take these.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        if let Some(serial) = &self.serial {
            check_serial(serial)?;
        }
        match self.queues {
            Some(queues) if !(1..=MAX_QUEUES).contains(&queues) => {
                Err(format!("{queues} queues; a volume has 1 to {MAX_QUEUES}"))
            }
            _ => Ok(()),
        }
    }

    /// Whether an attach has nothing of this.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// # Errors
/// A sentence, for what no guest can be shown as a serial.
pub fn check_serial(serial: &str) -> Result<(), String> {
    if serial.len() <= MAX_SERIAL && serial.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(());
    }
    Err(format!("a serial has at most {MAX_SERIAL} printable ASCII characters without spaces"))
}

impl Facts for AttachSettings {
    type Written = AttachSettings;

    fn to_written(&self) -> AttachSettings {
        self.clone()
    }

    fn from_written(written: AttachSettings, _id: &str) -> Result<Self, String> {
        written.check().map(|()| written)
    }

    fn difference(&self, found: &Self) -> Option<String> {
        (self != found).then(|| "other settings were kept with it".into())
    }
}

/// The name of the entry for a volume.
pub(crate) fn entry_of(id: VolumeId) -> String {
    format!("{id}{ENTRY_END}")
}

/// Whose settings are in an entry of this name; none if it is of something else.
pub(crate) fn owner_of_entry(name: &str) -> Option<VolumeId> {
    name.strip_suffix(ENTRY_END)?.parse().ok()
}

const ENTRY_END: &str = ".attach";

impl Catalog {
    /// What is kept with a volume for its attaches. A process that has no ledger finds nothing.
    ///
    /// # Errors
    /// `Corrupt` for what commands of this host have not set; those of the file system.
    pub fn attach_settings(&self, id: VolumeId) -> Result<AttachSettings> {
        self.kept(id)?.map_err(|doubt| refuse(id, &doubt))
    }

    /// What is kept with a volume, or why that is not believed.
    pub(crate) fn kept(&self, id: VolumeId) -> Result<Result<AttachSettings, Doubt>> {
        let Some(ledger) = &self.ledger else { return Ok(Ok(AttachSettings::default())) };
        ledger.setting(&entry_of(id)).map(|found| found.map(Option::unwrap_or_default))
    }

    /// Changes what is kept with a volume, of an attached one too: whoever has it attached is not told.
    ///
    /// # Errors
    /// That of `change`; `Usage` for what no attach could take; as [`Catalog::attach_settings`]. What is
    /// kept is as it was then.
    pub fn change_attach_settings(
        &self,
        id: VolumeId,
        change: impl FnOnce(&mut AttachSettings) -> Result<()>,
    ) -> Result<AttachSettings> {
        let _records = RecordsLock::acquire(self)?;
        // A volume that was deleted meanwhile gets no new entry.
        self.load(id)?;
        let before = self.attach_settings(id)?;
        let mut next = before.clone();
        change(&mut next)?;
        next.check().map_err(|problem| Error::new(Kind::Usage, problem))?;
        if let Some(ledger) = self.ledger.as_ref().filter(|_| next != before) {
            ledger.accept(&entry_of(id), next.clone())?;
        }
        Ok(next)
    }

    /// Accepts what is kept with a volume as it stands there, whoever wrote it. What cannot be read is
    /// forgotten.
    pub(crate) fn accept_attach_settings(&self, id: VolumeId) -> Result<()> {
        let Some(ledger) = &self.ledger else { return Ok(()) };
        let entry = entry_of(id);
        match (ledger.setting::<AttachSettings>(&entry)?, ledger.claim::<AttachSettings>(&entry)?) {
            (Ok(_), _) => Ok(()),
            (Err(_), Some(claimed)) => ledger.accept(&entry, claimed),
            (Err(_), None) => ledger.forget(&entry),
        }
    }
}

fn refuse(id: VolumeId, doubt: &Doubt) -> Error {
    doubt.refuse(&format_args!("{id}")).context("the settings that are kept with a volume")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_an_attach_could_take_is_kept() {
        let with = |serial: &str, queues| AttachSettings {
            serial: Some(serial.into()),
            queues: Some(queues),
            ..AttachSettings::default()
        };
        assert_eq!(with("db-01", 64).check(), Ok(()));
        for (serial, queues) in
            [("with space", 1), ("123456789012345678901", 1), ("ü", 1), ("a", 0), ("a", 65)]
        {
            assert!(with(serial, queues).check().is_err(), "{serial} {queues}");
        }
    }

    #[test]
    fn an_entry_is_a_volume_s_by_its_name() {
        let id = VolumeId::random();
        assert_eq!(owner_of_entry(&entry_of(id)), Some(id));
        assert_eq!(owner_of_entry(&id.to_string()), None);
        assert_eq!(owner_of_entry("x.attach"), None);
    }
}
