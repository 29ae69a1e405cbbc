//! The options of commands that copy: how much space they leave, and whether they begin without enough.
#![forbid(unsafe_code)]

use crate::base::size;
use crate::base::space::Reserve;
use crate::ops::Store;
use crate::ops::need::Budget;

/// What a command that copies takes.
#[derive(clap::Args)]
pub(super) struct SpaceArgs {
    /// How much of the store's file system the command leaves free, like 2GiB; 0: nothing. Below that it
    /// waits, and goes on when there is space [default: the settings' space-reserve, else a 20th of the
    /// file system, 4 GiB at most].
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    space_reserve: Option<u64>,
    /// Begin also where there may be too little space: the file system compresses, or is going to grow.
    #[arg(long)]
    skip_space_check: bool,
}

impl SpaceArgs {
    /// What may be used.
    pub(super) fn budget(&self, store: &Store) -> Budget {
        let (reserve, unchecked) = (self.reserve(store), self.skip_space_check);
        Budget { reserve, unchecked, ..Budget::default() }
    }

    /// What is to be left free.
    pub(super) fn reserve(&self, store: &Store) -> Reserve {
        self.space_reserve.map_or(store.settings().space_reserve, Reserve::of)
    }
}
