//! Long lists in pieces: Limit, Marker, NextMarker, Truncated.
//!
//! Pure. A marker names the last item that was shown, so that what is made or removed meanwhile neither
//! repeats nor hides an item that was there all the time.

use crate::kms::errors::out_of_range;
use crate::kms::{Exception, KmsError};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use std::ops::RangeInclusive;

/// How many items may be asked for at once.
pub const LIMIT: RangeInclusive<u32> = 1..=1000;

const PREFIX: &str = "after:";

/// Which piece is asked for.
#[derive(Clone, Debug, Default)]
pub struct Piece {
    /// How many items at most, of [`LIMIT`].
    pub limit: Option<u32>,
    /// NextMarker of the piece before.
    pub marker: Option<String>,
}

/// One piece of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T> {
    /// What it shows.
    pub items: Vec<T>,
    /// The marker of the next piece, if there is more.
    pub next: Option<String>,
}

impl Piece {
    /// Cuts the piece out of a list that is sorted by `name`, with at most `default` items
    /// where no limit is asked for.
    pub fn of<T>(
        &self,
        all: impl IntoIterator<Item = T>,
        name: impl Fn(&T) -> String,
        default: u32,
    ) -> Result<Page<T>, KmsError> {
        let limit = self.limit.unwrap_or(default);
        if !LIMIT.contains(&limit) {
            return Err(out_of_range(limit, "limit", &LIMIT));
        }
        let after = self.marker.as_deref().map(read_marker).transpose()?;
        let mut rest =
            all.into_iter().skip_while(|item| after.as_ref().is_some_and(|a| name(item) <= *a)).peekable();
        let items: Vec<T> = rest.by_ref().take(limit as usize).collect();
        let more = rest.peek().is_some();
        let next = items.last().filter(|_| more).map(|last| {
            let text = format!("{PREFIX}{}", name(last));
            URL_SAFE_NO_PAD.encode(text)
        });
        Ok(Page { items, next })
    }
}

fn read_marker(marker: &str) -> Result<String, KmsError> {
    let bytes = URL_SAFE_NO_PAD.decode(marker).ok();
    let text = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
    text.and_then(|text| text.strip_prefix(PREFIX).map(str::to_owned))
        .ok_or_else(|| KmsError::Other(Exception::InvalidMarker, "Could not deserialize NextMarker".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_add_up_to_the_list_also_when_it_changes() {
        let mut list: Vec<String> = (10..35).map(|n| n.to_string()).collect();
        let mut piece = Piece { limit: Some(10), marker: None };
        let mut seen = Vec::new();
        loop {
            let page = piece.of(list.clone(), String::clone, 100).unwrap();
            seen.extend(page.items);
            list.retain(|item| *item != seen[0]);
            let Some(next) = page.next else { break };
            piece.marker = Some(next);
        }
        assert_eq!(seen, (10..35).map(|n| n.to_string()).collect::<Vec<_>>());
        let all = Piece::default().of(["a", "b"], |i| i.to_string(), 2).unwrap();
        assert_eq!((all.items.len(), all.next), (2, None));
    }

    #[test]
    fn limits_and_markers_are_checked() {
        for limit in [0, 1001] {
            let piece = Piece { limit: Some(limit), marker: None };
            assert!(matches!(piece.of(["a"], |i| i.to_string(), 1), Err(KmsError::Validation(_))));
        }
        for marker in ["", "x", "!", &URL_SAFE_NO_PAD.encode("before:a")] {
            let piece = Piece { limit: None, marker: Some(marker.into()) };
            let error = piece.of(["a"], |i| i.to_string(), 1).unwrap_err();
            assert_eq!(error.type_name(), "InvalidMarkerException");
        }
    }
}
