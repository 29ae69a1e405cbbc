//! Sizes as people write and read them: `20GiB`, `20G`, `1.5 TB`, `1073741824`.
#![forbid(unsafe_code)]

/// A letter alone is a binary unit, as truncate(1), lvcreate(8) and qemu-img(1) have it.
const UNITS: [(&str, u64); 17] = [
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("m", 1 << 20),
    ("g", 1 << 30),
    ("t", 1 << 40),
    ("p", 1 << 50),
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
/// More digits after a point say nothing: a byte is the 10¹⁵th part of the largest unit.
const MAX_DECIMALS: usize = 15;

/// Reads a size: a number, which may have a decimal point, and a unit, in any case; no unit means bytes.
/// Returns in bytes, without a part of one.
///
/// # Errors
/// A sentence that says what would be understood.
pub fn parse(text: &str) -> Result<u64, String> {
    let example = "write a number and a unit, such as 20GiB or 20G (1024³ bytes), 20GB (1000³ bytes), 0.5TiB";
    let no_size = || format!("{text:?} is not a size; {example}");
    let end = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
    let (number, unit) = text.split_at(end);
    let (whole, decimals) = match number.split_once('.') {
        Some((whole, decimals)) if !decimals.is_empty() => (whole, decimals),
        Some(_) => return Err(no_size()),
        None => (number, ""),
    };
    if whole.is_empty() || decimals.contains('.') || decimals.len() > MAX_DECIMALS {
        return Err(no_size());
    }
    let unit = unit.trim_start().to_ascii_lowercase();
    let Some((_, factor)) = UNITS.iter().find(|(name, _)| *name == unit) else {
        return Err(format!("{text:?} has an unknown unit; {example}"));
    };
    // All digits are some 10^-n: 20 of them before the point, and 15 after, go into 128 bits.
    let scale = 10_u128.pow(decimals.len() as u32);
    let scaled = format!("{whole}{decimals}").parse::<u128>().ok();
    let size = scaled.and_then(|n| n.checked_mul(u128::from(*factor))).map(|n| n / scale);
    let size = size.and_then(|n| u64::try_from(n).ok());
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
            ("10g", 10 << 30),
            ("10 G", 10 << 30),
            ("64k", 64 << 10),
            ("1.5T", 3 << 39),
            ("0.5TiB", 1 << 39),
            ("0.001KB", 1),
            ("0.0001KB", 0),
            ("1.000000000000001PB", 1_000_000_000_000_001),
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
            "1.GiB",
            ".5GiB",
            "1.5.5GiB",
            "1.0000000000000001PB",
            "20Gi",
            "20E",
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
