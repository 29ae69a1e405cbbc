//! What the process that has a PKCS#11 module answers.

use super::input::Input;
use sealblk::hsm::Problem;
use sealblk::hsm::message::{Answer, Bytes, ID_LEN, IV_LEN, Question, TAG_LEN, TEXT_MAX};

/// A question, and any line as its answer.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let question = question(&mut input);
    let line = input.rest();
    match Answer::parse(&question, line) {
        Answer::Refused(refusal) => {
            assert!(refusal.words.chars().all(|c| !c.is_control()), "it steers a terminal");
            // An escape has at most 12 characters for one.
            assert!(refusal.words.chars().count() <= 400 * 12);
        }
        answer => {
            let written = serde_json::to_vec(&answer).expect("what was read can be written");
            assert_eq!(Answer::parse(&question, &written), answer);
            fits(&question, &answer);
        }
    }
    let again = Answer::parse(&question, b"{}");
    assert!(matches!(again, Answer::Refused(refusal) if refusal.problem == Problem::Lost));
}

fn fits(question: &Question, answer: &Answer) {
    match (question, answer) {
        (Question::Make { .. } | Question::Destroy { .. }, Answer::Done) => {}
        (Question::Find { .. }, Answer::Found(_)) => {}
        (Question::Encrypt { len, .. }, Answer::Encrypted { iv, text }) => {
            assert_eq!((iv.0.len(), text.0.len()), (IV_LEN, len + TAG_LEN));
        }
        (Question::Decrypt { text, .. }, Answer::Filled(len)) => {
            assert!(*len <= TEXT_MAX && len + TAG_LEN == text.0.len());
        }
        (Question::Random { len: asked }, Answer::Filled(len)) => assert!(len == asked && *len <= TEXT_MAX),
        other => panic!("it does not fit: {other:?}"),
    }
}

fn question(input: &mut Input) -> Question {
    let id = || Bytes(vec![7; ID_LEN]);
    let len = usize::from(input.u16()) % (TEXT_MAX + 2 * TAG_LEN);
    match input.u8() % 6 {
        0 => Question::Make { id: id(), label: "key".into() },
        1 => Question::Find { id: id() },
        2 => Question::Destroy { id: id() },
        3 => Question::Encrypt { id: id(), iv: Bytes(vec![0; IV_LEN]), aad: Bytes(Vec::new()), len },
        4 => Question::Decrypt {
            id: id(),
            iv: Bytes(vec![0; IV_LEN]),
            aad: Bytes(Vec::new()),
            text: Bytes(vec![0; len]),
        },
        _ => Question::Random { len },
    }
}
