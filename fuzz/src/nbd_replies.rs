//! What an NBD server sends, once an export is served.

use super::input::Input;
use sealblk::backing::nbd::replies::{Answer, Given, Replies, Wanted};
use std::collections::HashMap;

/// The export's bytes in this target; requests are about a few of them.
const MAP: u32 = 7;

/// Requests, and any bytes in answer, in pieces of any length.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let structured = input.coin();
    let mut replies = Replies::on(structured, structured.then_some(MAP));
    let mut asked = HashMap::new();
    for _ in 0..input.u8() % 8 {
        let cookie = u64::from(input.u8() % 16);
        let wanted = match input.u8() % 3 {
            0 => Wanted::Nothing,
            1 => Wanted::Bytes { offset: input.u64(), len: 1 + u32::from(input.u16()) },
            _ if structured => Wanted::Map,
            _ => Wanted::Nothing,
        };
        if asked.insert(cookie, wanted).is_none() {
            replies.ask(cookie, wanted);
        } else {
            // A number that is in use is not used again.
            asked.remove(&cookie);
            replies = Replies::on(structured, structured.then_some(MAP));
            asked.clear();
        }
    }
    let step = 1 + usize::from(input.u8());
    let mut answers = Vec::new();
    for bytes in input.rest().chunks(step) {
        if replies.feed(bytes, &mut answers).is_err() {
            break;
        }
        assert_eq!(replies.outstanding() + answers.len(), asked.len(), "each request has one answer");
    }
    for Answer { cookie, given } in answers {
        let wanted = asked.remove(&cookie).expect("it was asked, and not answered yet");
        match (given, wanted) {
            (Ok(Given::Nothing), Wanted::Nothing) => {}
            (Ok(Given::Bytes(bytes)), Wanted::Bytes { len, .. }) => assert_eq!(bytes.len(), len as usize),
            (Ok(Given::Map(runs)), Wanted::Map) => {
                assert!(!runs.is_empty() && runs.iter().all(|run| run.len > 0));
            }
            (Err(error), _) => assert_ne!(error, 0),
            (given, wanted) => panic!("{given:?} for {wanted:?}"),
        }
    }
}
