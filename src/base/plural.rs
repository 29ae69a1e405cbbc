//! Numbers of things, in words.
#![forbid(unsafe_code)]

use std::fmt::Display;

/// So many things: `one` where it is one, else `many`.
pub fn counted<N: Display + PartialEq + From<u8>>(n: N, one: &str, many: &str) -> String {
    let word = if n == N::from(1) { one } else { many };
    format!("{n} {word}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_not_several() {
        let changes = |n: usize| counted(n, "change", "changes");
        assert_eq!([changes(0), changes(1), changes(2)], ["0 changes", "1 change", "2 changes"]);
    }
}
