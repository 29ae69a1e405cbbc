//! `--sort` of lists.
#![forbid(unsafe_code)]

use crate::base::Timestamp;
use clap::{Args, ValueEnum};
use std::cmp::Ordering;

/// In which order a list is.
#[derive(Args)]
pub(super) struct SortArgs {
    /// In which order; whatever has no name comes after all that have one. Of equal ones the older comes
    /// first, then the lower id.
    #[arg(long, value_enum, value_name = "BY", default_value_t = By::Name)]
    sort: By,
    /// The other way round.
    #[arg(long, short)]
    reverse: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum By {
    Name,
    Id,
    Size,
    Created,
}

/// What one row of a list is put in order by. Of a record that cannot be read, only the id is known.
pub(super) struct Place<'a, I> {
    pub(super) name: Option<&'a str>,
    pub(super) id: I,
    pub(super) size: Option<u64>,
    pub(super) created: Option<Timestamp>,
}

impl SortArgs {
    /// The order of a list of which nobody has said another.
    pub(super) const DEFAULT: SortArgs = SortArgs { sort: By::Name, reverse: false };

    /// Puts what has these places in order.
    pub(super) fn sort<T, I: Ord>(&self, list: &mut [T], place: impl Fn(&T) -> Place<'_, I>) {
        list.sort_by(|one, other| {
            let (one, other) = (place(one), place(other));
            let by = match self.sort {
                By::Name => last_without(&one.name, &other.name),
                By::Id => one.id.cmp(&other.id),
                By::Size => last_without(&one.size, &other.size),
                By::Created => last_without(&one.created, &other.created),
            };
            // Things of one name are in the order in which they were made.
            let by = by.then_with(|| last_without(&one.created, &other.created));
            by.then_with(|| one.id.cmp(&other.id))
        });
        if self.reverse {
            list.reverse();
        }
    }
}

fn last_without<T: Ord>(one: &Option<T>, other: &Option<T>) -> Ordering {
    one.is_none().cmp(&other.is_none()).then_with(|| one.cmp(other))
}
