//! The audit log: lines and marks that are anything, and logs that were written and then damaged.

use super::input::Input;
use sealblk::audit::line::{self, AuditKey, Position};
use sealblk::audit::mark::Mark;
use sealblk::audit::verify::{Checker, Report, each_line};
use sealblk::crypt::secret_mem::SecretBytes;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::LazyLock;
use uuid::Uuid;

const LOG: Uuid = Uuid::from_u128(7);

static KEY: LazyLock<AuditKey> = LazyLock::new(|| {
    AuditKey::new(Uuid::from_u128(1), SecretBytes::copy_of(&[1; 32]).expect("locked memory"))
});

/// Any bytes as a log or a mark, or a log that was written and damaged.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() % 3 {
        0 => {
            let bytes = input.rest();
            check(bytes, None);
            if let Some(line) = line::parse(bytes) {
                assert!(line.mac.is_none_or(|mac| !mac.is_of(&KEY)), "nobody guesses a MAC");
            }
        }
        1 => {
            if let Some((mark, mac)) = Mark::parse(input.rest()) {
                assert_eq!(Mark::parse(&mark.encode(None)), Some((mark.clone(), None)));
                assert!(!mac.is_some_and(|mac| mark.is_authentic(&mac, &KEY)));
            }
        }
        _ => damaged(&mut input),
    }
}

/// What who has the key finds.
fn check(bytes: &[u8], mark: Option<Position>) -> Report {
    let mark = mark.map(|position| (Mark { log: LOG, position, folder: [0; 32] }, PathBuf::from("mark")));
    let mut checker = Checker::new(Some(&KEY), mark.into_iter().collect());
    let take = |line: &[u8], torn| {
        checker.line(line, torn);
        ControlFlow::Continue(())
    };
    each_line(bytes, take).expect("reading from memory");
    checker.finish()
}

/// Writes a log, of whose end there is a mark, and damages it in one way: that is found, and the first record
/// that it hits is named. What a crash leaves is no damage.
fn damaged(input: &mut Input) {
    let (mut lines, mut place) = (Vec::new(), Position::START);
    for _ in 0..2 + input.u8() % 5 {
        let by_kms = input.coin();
        let source = if by_kms { line::KMS_SOURCE } else { "sealblk" };
        let note = "x".repeat(usize::from(input.u8()));
        let what = serde_json::json!({ "eventSource": source, "note": note });
        let (line, after) = line::encode(LOG, &place, &what, by_kms.then_some(&*KEY)).expect("few records");
        lines.push(line);
        place = after;
    }
    let whole = lines.concat();
    let report = check(&whole, Some(place));
    assert_eq!((report.problem, report.records), (None, lines.len() as u64));

    let (kind, n) = (input.u8() % 5, usize::from(input.u8()) % lines.len());
    let at = usize::from(input.u16());
    let first = match kind {
        0 => {
            let at = at % lines[n].len();
            lines[n][at] ^= 1 | input.u8();
            n
        }
        1 => {
            lines.remove(n);
            n
        }
        2 => {
            let other = (n + 1 + at % (lines.len() - 1)) % lines.len();
            lines.swap(n, other);
            n.min(other)
        }
        3 => {
            let at = at % lines[n].len();
            lines[n].truncate(at);
            lines.truncate(n + 1);
            n
        }
        _ => {
            // What a crash leaves: an unfinished line, behind which others go on.
            let mut left: Vec<u8> =
                input.bytes(300).iter().map(|&b| if b == b'\n' { 0 } else { b }).collect();
            left.insert(0, b'{');
            left.push(b'\n');
            lines.insert(n, left);
            let report = check(&lines.concat(), Some(place));
            assert_eq!((report.problem, report.unfinished), (None, vec![n as u64 + 1]));
            return;
        }
    };
    let report = check(&lines.concat(), Some(place));
    let problem = report.problem.expect("damage is found");
    assert_eq!(problem.record, Some(first as u64 + 1), "{}", problem.message);
    assert_eq!(report.records, first as u64);
}
