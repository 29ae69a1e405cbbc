//! The ways of one thread of a fetcher to the places that layers come from.

use crate::backup::{self as place, PlaceId};
use crate::base::{Error, Kind, Result};
use crate::helper::carry::{Carrier, Carriers};
use crate::ops::backup::Target;

/// One thread's way to the places.
#[derive(Default)]
pub(super) struct Sources(Vec<(Target, Carrier)>);

impl Sources {
    /// The carrier to a place that is the one it should be.
    pub(super) fn to(&mut self, carriers: &Carriers, target: &Target, id: PlaceId) -> Result<&mut Carrier> {
        let is_it = |known: &(Target, Carrier)| known.0.url == target.url && known.0.access == target.access;
        let n = match self.0.iter().position(is_it) {
            Some(n) => n,
            None => {
                let mut carrier = carriers.next(&target.url, &target.access)?;
                check_place(&mut carrier, id)?;
                self.0.push((target.clone(), carrier));
                self.0.len() - 1
            }
        };
        Ok(&mut self.0[n].1)
    }

    pub(super) fn forget(&mut self, target: &Target) {
        self.0.retain(|(known, _)| known.url != target.url || known.access != target.access);
    }
}

/// # Errors
/// `NotFound` if there is no place, or another one: then it is not there that a block is missing.
pub(super) fn check_place(carrier: &mut Carrier, id: PlaceId) -> Result<()> {
    let found = carrier.get(&place::place_file(), place::PLACE_MAX)?;
    let none = || Error::new(Kind::NotFound, "there is no place.json: is the medium mounted?");
    match PlaceId::from_json(&found.ok_or_else(none)?)? {
        found if found == id => Ok(()),
        found => Err(Error::new(Kind::NotFound, format!("another place is there ({found} and not {id})"))),
    }
}
