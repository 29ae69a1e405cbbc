//! The KMS log: headers and records that are anything, and logs that were written and then damaged.

use super::input::Input;
use sealblk::kms::KmsError;
use sealblk::kms::embedded::keys::{LogKeys, RootKey};
use sealblk::kms::embedded::log::{HEADER_LEN, Header, Next, Position, encode_record, next_record};
use std::sync::LazyLock;
use uuid::Uuid;

const START: Position = Position { seq: 0, chain: [0; 32] };

static KEYS: LazyLock<LogKeys> = LazyLock::new(|| {
    let root = RootKey::copy_of(&[1; 32]);
    LogKeys::derive(&root.expect("locked memory"), Uuid::from_u128(1)).expect("locked memory")
});

/// Any bytes as a header and as records, or a log that was written and damaged.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    if input.coin() {
        header(input.rest());
    } else if input.coin() {
        let offset = u64::from(input.u16());
        let bytes = input.rest();
        match next_record(&START, bytes, offset, &KEYS) {
            // Whoever sees every comparison learns the MAC that is expected; then it is a
            // record as we write it.
            Ok(Next::Record { body, after, len }) => {
                assert_eq!((bytes[..len].to_vec(), after), encode_record(&START, body, &KEYS));
            }
            Ok(Next::End) => assert!(bytes.is_empty()),
            Ok(Next::Torn) => assert!(!bytes.is_empty()),
            Err(e) => assert!(matches!(e, KmsError::Corrupt(_))),
        }
    } else {
        damaged(&mut input);
    }
}

fn header(bytes: &[u8]) {
    let Ok(header) = Header::parse(bytes) else { return };
    let made = header.encode(&KEYS);
    assert_eq!(Header::parse(&made), Ok(header));
    assert!(Header::is_authentic(&made, &KEYS));
    assert_eq!(Header::is_authentic(bytes, &KEYS), bytes[..HEADER_LEN] == made[..]);
}

/// Writes a log that begins anywhere in a sector, damages it in one way, and reads it: what comes out was put
/// in, in order, and only the damage that a power cut does to the last record is forgiven.
fn damaged(input: &mut Input) {
    let offset = u64::from(input.u16());
    let (mut bytes, mut place, mut written) = (Vec::new(), START, Vec::new());
    let mut last = 0;
    for _ in 0..1 + input.u8() % 4 {
        let len = 1 + usize::from(input.u16()) % 2000;
        // Never zero, as no JSON is: a body of zeros would be its own power cut.
        let body = vec![1 | input.u8(); len];
        let (record, after) = encode_record(&place, &body, &KEYS);
        last = bytes.len();
        bytes.extend(record);
        place = after;
        written.push(body);
    }
    let whole = bytes.clone();
    let (kind, at) = (input.u8() % 5, usize::from(input.u16()) % bytes.len());
    match kind {
        // A write that was cut short.
        0 => bytes.truncate(at),
        // A longer file, of whose last record only the sectors before a boundary were written.
        1 => {
            let boundary = (offset as usize + last + at % (bytes.len() - last)).next_multiple_of(512);
            let from = (boundary - offset as usize).min(bytes.len());
            bytes[from..].fill(0);
        }
        2 => bytes[at] ^= 1 | input.u8(),
        3 => bytes.extend(std::iter::repeat_n(0, at)),
        _ => bytes.extend_from_slice(input.rest()),
    }
    let (read, end) = replay(&bytes, offset);
    let common = read.len().min(written.len());
    assert_eq!(read[..common], written[..common]);
    match kind {
        0 => assert_ne!(end, End::Damaged),
        1 if bytes == whole => assert_eq!((read.len(), end), (written.len(), End::Clean)),
        1 => assert_eq!((read.len(), end), (written.len() - 1, End::Torn)),
        2 => {
            // A last sector with one byte in it, changed to zero, looks like one that was never written.
            let last_sector = (offset as usize + bytes.len() - 1) / 512 * 512;
            let tail = &bytes[last_sector.saturating_sub(offset as usize)..];
            assert!(read.len() < written.len());
            assert!(end == End::Damaged || tail.iter().all(|&b| b == 0));
        }
        3 => assert_eq!((read.len(), end == End::Clean), (written.len(), at == 0)),
        _ => assert_eq!(common, written.len()),
    }
}

#[derive(Debug, PartialEq)]
enum End {
    Clean,
    Torn,
    Damaged,
}

/// Reads records until there are no more; answers their bodies and how the log ends.
fn replay(bytes: &[u8], offset: u64) -> (Vec<Vec<u8>>, End) {
    let (mut place, mut at, mut bodies) = (START, 0, Vec::new());
    loop {
        match next_record(&place, &bytes[at..], offset + at as u64, &KEYS) {
            Ok(Next::Record { body, after, len }) => {
                bodies.push(body.to_vec());
                place = after;
                at += len;
            }
            Ok(Next::End) => return (bodies, End::Clean),
            Ok(Next::Torn) => return (bodies, End::Torn),
            Err(_) => return (bodies, End::Damaged),
        }
    }
}
