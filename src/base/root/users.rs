//! Users by their names, for people.
#![forbid(unsafe_code)]

use nix::unistd::{Uid, User};

/// The user's name; where there is none, the number in words.
pub(super) fn name_of(user: u32) -> String {
    let known = User::from_uid(Uid::from_raw(user)).ok().flatten();
    known.map_or_else(|| format!("the user {user}"), |user| user.name)
}
