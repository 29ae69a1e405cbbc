//! Sizes as people write and read them: `20GiB`, `512 MB`, `1073741824`.
#![forbid(unsafe_code)]

const UNITS: [(&str, u64); 11] = [
    ("b", 1),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
    ("pib", 1 << 50),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("pb", 1_000_000_000_000_000),
];

/// Reads a size: a whole number and a unit, in any case; no unit means bytes. Returns in bytes.
///
/// # Errors
/// A sentence that says what would be understood.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let example = "write a whole number and a unit, such as 20GiB (1024³ bytes) or 20GB (1000³ bytes)";
    if number.is_empty() {
        return Err(format!("{text:?} is not a size; {example}"));
    }
    let unit = unit.trim_start().to_ascii_lowercase();
    let factor = match UNITS.iter().find(|(name, _)| *name == unit) {
        Some((_, factor)) => *factor,
        None if unit.is_empty() => 1,
        None => return Err(format!("{text:?} has an unknown unit; {example}")),
    };
    let size = number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor));
    size.ok_or_else(|| format!("{text:?} is too large; 2⁶⁴ bytes and more have no address"))
}

/// A size in bytes as a person reads it: in the largest binary unit that leaves no rest, else in bytes.
pub fn human(bytes: u64) -> String {
    let units = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| bytes >= 1 << shift && bytes.trailing_zeros() >= *shift) {
        Some((name, shift)) => format!("{} {name}", bytes >> shift),
        None => format!("{bytes} B"),
    }
}

/// About how much that is: in the largest binary unit of which there is one, with one digit after the point.
pub fn about(bytes: u64) -> String {
    let units = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| bytes >= 1 << shift) {
        Some((name, shift)) => format!("{:.1} {name}", bytes as f64 / (1u64 << shift) as f64),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_with_units_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("20GiB", 20 << 30),
            ("20 gib", 20 << 30),
            ("1KB", 1000),
            ("2TB", 2_000_000_000_000),
            ("8191PiB", 8191 << 50),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for text in [
            "",
            "GiB",
            "-1",
            "+1",
            "1.5GiB",
            "20G",
            "20GiBs",
            " 1",
            "0x10",
            "16384PiB",
            "99999999999999999999",
            "１",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn what_is_shown_is_exact() {
        for (bytes, text) in
            [(0, "0 B"), (512, "512 B"), (1536, "1536 B"), (20 << 30, "20 GiB"), (5 << 40, "5 TiB")]
        {
            assert_eq!(human(bytes), text);
        }
    }
}
