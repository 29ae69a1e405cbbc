//! What a server answers, as it comes by the socket: pure, byte for byte.
//!
//! The server is a stranger. An answer is to something that was asked and is not answered yet; its bytes go
//! nowhere but to what was asked for; each byte of it comes once, and all of them come. Anything else is a
//! [`Violation`], after which nothing of that connection is believed. Memory is taken for what was asked, and
//! for one message of bounded length.
#![forbid(unsafe_code)]

use super::handshake::Terms;
use super::protocol::*;
use std::collections::{BTreeMap, HashMap};
use std::fmt;

/// The longest list of runs that is taken: a server may tell as much as it likes at once.
const RUNS_MAX: usize = 1 << 16;
/// The longest error message: as long as the protocol's strings, with what is around.
const ERROR_MAX: usize = 4096 + 6 + 8;

/// What is to come for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// That it was done.
    Nothing,
    /// The bytes at `offset`.
    Bytes {
        /// Where they are in the export.
        offset: u64,
        /// How many: at least one.
        len: u32,
    },
    /// Where zeros are.
    Map,
}

/// What has come for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Given {
    /// It was done.
    Nothing,
    /// All of the bytes.
    Bytes(Vec<u8>),
    /// Runs from the offset on that was asked about. The last one may go further than was asked.
    Map(Vec<Run>),
}

/// A run of an export's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// How many: at least one.
    pub len: u32,
    /// Whether they read as zeros.
    pub zero: bool,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The request's number.
    pub cookie: u64,
    /// What has come; or the server's error, in the protocol's numbers.
    pub given: Result<Given, u32>,
}

/// The server has not kept to the protocol.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation(&'static str);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// A request that is not answered yet.
struct Asked {
    wanted: Wanted,
    /// Room for bytes; what is a hole stays zeros.
    bytes: Vec<u8>,
    /// Which of them have come: beginnings and ends of runs that do not touch.
    come: BTreeMap<usize, usize>,
    map: Option<Vec<Run>>,
    error: Option<u32>,
}

/// A chunk of a structured reply.
#[derive(Clone, Copy)]
struct Chunk {
    cookie: u64,
    kind: u16,
    is_last: bool,
    len: usize,
}

/// What comes next.
enum Next {
    /// The head of a reply, as long as a simple one's.
    Head,
    /// The length in the head of a chunk.
    Length(Chunk),
    /// The part of a chunk that is looked at as a whole: for bytes, where they belong.
    Body(Chunk),
    /// So many bytes, and where in the room of the request they belong.
    Bytes { cookie: u64, at: usize, left: usize, is_last: bool },
}

/// Bytes of [`Next::Head`].
const HEAD: usize = 16;

/// The answers of one connection.
pub struct Replies {
    structured: bool,
    map: Option<u32>,
    asked: HashMap<u64, Asked>,
    next: Next,
    /// What has come of it, and how long it is going to be.
    part: Vec<u8>,
    part_len: usize,
}

impl Replies {
    /// Those of a connection that has just begun, on these terms.
    pub fn new(terms: &Terms) -> Self {
        Replies::on(terms.structured, terms.map)
    }

    /// Those of a connection with structured replies, or without; `map` is the number of its map of zeros.
    pub fn on(structured: bool, map: Option<u32>) -> Self {
        let (next, part) = (Next::Head, Vec::new());
        Replies { structured, map, asked: HashMap::new(), next, part, part_len: HEAD }
    }

    /// A request with this number is sent, which none has that is not answered yet.
    pub fn ask(&mut self, cookie: u64, wanted: Wanted) {
        let room = if let Wanted::Bytes { len, .. } = wanted { len as usize } else { 0 };
        let asked = Asked { wanted, bytes: vec![0; room], come: BTreeMap::new(), map: None, error: None };
        self.asked.insert(cookie, asked);
    }

    /// Requests that are not answered yet.
    pub fn outstanding(&self) -> usize {
        self.asked.len()
    }

    /// Takes bytes that have come, and adds what they complete to `answers`.
    ///
    /// # Errors
    /// A violation. What is in `answers` by then holds; nothing else may be given to this.
    pub fn feed(&mut self, mut bytes: &[u8], answers: &mut Vec<Answer>) -> Result<(), Violation> {
        while !bytes.is_empty() {
            if let Next::Bytes { cookie, at, left, is_last } = &mut self.next {
                let (now, later) = bytes.split_at(bytes.len().min(*left));
                let asked = self.asked.get_mut(cookie).ok_or(UNASKED)?;
                asked.bytes[*at..][..now.len()].copy_from_slice(now);
                (*at, *left, bytes) = (*at + now.len(), *left - now.len(), later);
                let (cookie, is_last, is_over) = (*cookie, *is_last, *left == 0);
                if is_over {
                    self.chunk_is_over(cookie, is_last, answers)?;
                }
                continue;
            }
            let (now, later) = bytes.split_at(bytes.len().min(self.part_len - self.part.len()));
            self.part.extend_from_slice(now);
            bytes = later;
            if self.part.len() == self.part_len {
                let part = std::mem::take(&mut self.part);
                self.look(&part, answers)?;
            }
        }
        Ok(())
    }

    /// Looks at a part that is there as a whole.
    fn look(&mut self, part: &[u8], answers: &mut Vec<Answer>) -> Result<(), Violation> {
        match std::mem::replace(&mut self.next, Next::Head) {
            Next::Head => self.head(part, answers),
            Next::Length(chunk) => {
                let chunk = Chunk { len: number(part, 0) as usize, ..chunk };
                self.chunk(chunk, answers)
            }
            Next::Body(chunk) => self.body(chunk, part, answers),
            Next::Bytes { .. } => unreachable!("these are not collected"),
        }
    }

    fn expect(&mut self, next: Next, len: usize) {
        (self.next, self.part_len) = (next, len);
        self.part.clear();
    }

    fn head(&mut self, head: &[u8], answers: &mut Vec<Answer>) -> Result<(), Violation> {
        let cookie = u64::from_be_bytes(head[8..HEAD].try_into().expect("8 bytes"));
        let asked = self.asked.get_mut(&cookie);
        match number(head, 0) {
            SIMPLE_REPLY => {
                let asked = asked.ok_or(UNASKED)?;
                // Chunks of it have come.
                if !asked.come.is_empty() || asked.map.is_some() || asked.error.is_some() {
                    return Err(Violation("two replies to one request"));
                }
                match (number(head, 4), asked.wanted) {
                    (0, Wanted::Nothing) => {}
                    (0, Wanted::Bytes { len, .. }) if !self.structured => {
                        asked.come.insert(0, len as usize);
                        let (left, is_last) = (len as usize, true);
                        self.expect(Next::Bytes { cookie, at: 0, left, is_last }, 0);
                        return Ok(());
                    }
                    (0, _) => return Err(Violation("a simple reply where a structured one has to be")),
                    (error, _) => asked.error = Some(error),
                }
                self.chunk_is_over(cookie, true, answers)
            }
            STRUCTURED_REPLY if self.structured => {
                asked.ok_or(UNASKED)?;
                let half = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
                let is_last = half(4) & CHUNK_DONE != 0;
                self.expect(Next::Length(Chunk { cookie, kind: half(6), is_last, len: 0 }), 4);
                Ok(())
            }
            STRUCTURED_REPLY => Err(Violation("a structured reply, which was not agreed on")),
            _ => Err(Violation("what comes is no reply")),
        }
    }

    /// A chunk begins, of which the length is known.
    fn chunk(&mut self, chunk: Chunk, answers: &mut Vec<Answer>) -> Result<(), Violation> {
        let Chunk { cookie, kind, is_last, len } = chunk;
        let asked = self.asked.get(&cookie).ok_or(UNASKED)?;
        let body = match (kind, asked.wanted) {
            (CHUNK_NONE, _) if len == 0 && is_last => return self.chunk_is_over(cookie, true, answers),
            (CHUNK_OFFSET_DATA, Wanted::Bytes { .. }) if len > 8 => 8,
            (CHUNK_OFFSET_HOLE, Wanted::Bytes { .. }) if len == 12 => len,
            (CHUNK_BLOCK_STATUS, Wanted::Map) if (12..=4 + 8 * RUNS_MAX).contains(&len) => len,
            (kind, _) if kind & CHUNK_ERROR != 0 && (6..=ERROR_MAX).contains(&len) => len,
            _ => return Err(Violation("a chunk that does not belong to what was asked")),
        };
        self.expect(Next::Body(chunk), body);
        Ok(())
    }

    fn body(&mut self, chunk: Chunk, body: &[u8], answers: &mut Vec<Answer>) -> Result<(), Violation> {
        let Chunk { cookie, kind, is_last, len } = chunk;
        let asked = self.asked.get_mut(&cookie).ok_or(UNASKED)?;
        match kind {
            CHUNK_OFFSET_DATA => {
                let left = len - 8;
                let at = asked.mark_come(long(body), left)?;
                self.expect(Next::Bytes { cookie, at, left, is_last }, 0);
                return Ok(());
            }
            CHUNK_OFFSET_HOLE => {
                asked.mark_come(long(body), number(body, 8) as usize)?;
            }
            CHUNK_BLOCK_STATUS => {
                if asked.map.is_some() || Some(number(body, 0)) != self.map {
                    return Err(Violation("a map that was not asked for"));
                }
                asked.map = Some(runs(&body[4..])?);
            }
            _ => {
                let error = number(body, 0);
                if error == 0 {
                    return Err(Violation("an error that is none"));
                }
                asked.error.get_or_insert(error);
            }
        }
        self.chunk_is_over(cookie, is_last, answers)
    }

    /// A chunk is there as a whole; with the last one, the answer is.
    fn chunk_is_over(
        &mut self,
        cookie: u64,
        is_last: bool,
        answers: &mut Vec<Answer>,
    ) -> Result<(), Violation> {
        self.expect(Next::Head, HEAD);
        if !is_last {
            return Ok(());
        }
        let asked = self.asked.remove(&cookie).ok_or(UNASKED)?;
        let given = match (asked.error, asked.wanted) {
            (Some(error), _) => Err(error),
            (None, Wanted::Nothing) => Ok(Given::Nothing),
            (None, Wanted::Bytes { len, .. }) if asked.come.get(&0) == Some(&(len as usize)) => {
                Ok(Given::Bytes(asked.bytes))
            }
            (None, Wanted::Bytes { .. }) => return Err(Violation("not all bytes have come")),
            (None, Wanted::Map) => Ok(Given::Map(asked.map.ok_or(Violation("the map has not come"))?)),
        };
        answers.push(Answer { cookie, given });
        Ok(())
    }
}

/// Runs of an answer's bytes that do not touch, at most: what they take is small beside the bytes.
const APART_MAX: usize = 256;
const UNASKED: Violation = Violation("a reply to nothing that was asked");

impl Asked {
    /// Notes that `len` bytes at `offset` of the export come. Returns where they belong.
    fn mark_come(&mut self, offset: u64, len: usize) -> Result<usize, Violation> {
        const OUTSIDE: Violation = Violation("bytes that were not asked for");
        let Wanted::Bytes { offset: first, .. } = self.wanted else { return Err(OUTSIDE) };
        let at = offset.checked_sub(first).and_then(|at| usize::try_from(at).ok()).ok_or(OUTSIDE)?;
        let end = at.checked_add(len).filter(|end| len > 0 && *end <= self.bytes.len()).ok_or(OUTSIDE)?;
        let (mut from, mut to) = (at, end);
        if let Some((&before, &before_end)) = self.come.range(..end).next_back() {
            if before_end > at {
                return Err(Violation("bytes come twice"));
            }
            if before_end == at {
                from = before;
            }
        }
        if let Some(after_end) = self.come.remove(&end) {
            to = after_end;
        }
        self.come.insert(from, to);
        if self.come.len() > APART_MAX {
            return Err(Violation("an answer in too many pieces"));
        }
        Ok(at)
    }
}

fn runs(body: &[u8]) -> Result<Vec<Run>, Violation> {
    let (runs, rest) = body.as_chunks::<8>();
    if !rest.is_empty() {
        return Err(Violation("a map that is cut off"));
    }
    let run = |run: &[u8; 8]| match number(run, 0) {
        0 => Err(Violation("a run of nothing")),
        len => Ok(Run { len, zero: number(run, 4) & STATE_ZERO != 0 }),
    };
    runs.iter().map(run).collect()
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn long(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn simple(error: u32, cookie: u64) -> Vec<u8> {
        [&SIMPLE_REPLY.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes()].concat()
    }

    fn chunk(flags: u16, kind: u16, cookie: u64, body: &[u8]) -> Vec<u8> {
        let mut bytes = STRUCTURED_REPLY.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend((body.len() as u32).to_be_bytes());
        bytes.extend(body);
        bytes
    }

    fn data(flags: u16, cookie: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
        chunk(flags, CHUNK_OFFSET_DATA, cookie, &[&offset.to_be_bytes()[..], bytes].concat())
    }

    fn hole(flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
        chunk(flags, CHUNK_OFFSET_HOLE, cookie, &[&offset.to_be_bytes()[..], &len.to_be_bytes()].concat())
    }

    /// What becomes of these bytes, if they come in pieces of `step`.
    fn fed(replies: &mut Replies, bytes: &[u8], step: usize) -> (Vec<Answer>, Result<(), Violation>) {
        let mut answers = Vec::new();
        let result = bytes.chunks(step).try_for_each(|bytes| replies.feed(bytes, &mut answers));
        (answers, result)
    }

    /// A connection on which 4 bytes at 100 are asked for with the number 7, and with 8 that something is
    /// done.
    fn asked(structured: bool) -> Replies {
        let mut replies = Replies::on(structured, structured.then_some(5));
        replies.ask(7, Wanted::Bytes { offset: 100, len: 4 });
        replies.ask(8, Wanted::Nothing);
        replies
    }

    #[test]
    fn answers_come_in_any_order_and_in_any_pieces() {
        let plain = [simple(0, 8), simple(0, 7), b"abcd".to_vec()].concat();
        let chunks = [data(0, 7, 102, b"cd"), simple(28, 8), data(CHUNK_DONE, 7, 100, b"ab")].concat();
        for step in [1, 3, 16, 1000] {
            let (answers, result) = fed(&mut asked(false), &plain, step);
            result.unwrap();
            assert_eq!(answers[0], Answer { cookie: 8, given: Ok(Given::Nothing) });
            assert_eq!(answers[1], Answer { cookie: 7, given: Ok(Given::Bytes(b"abcd".to_vec())) });
            let mut replies = asked(true);
            let (answers, result) = fed(&mut replies, &chunks, step);
            result.unwrap();
            assert_eq!(answers[0], Answer { cookie: 8, given: Err(28) });
            assert_eq!(answers[1], Answer { cookie: 7, given: Ok(Given::Bytes(b"abcd".to_vec())) });
            assert_eq!(replies.outstanding(), 0);
        }
    }

    #[test]
    fn holes_are_zeros_and_an_error_is_told_after_its_last_chunk() {
        let mut replies = asked(true);
        let bytes =
            [hole(0, 7, 100, 3), data(0, 7, 103, b"d"), chunk(CHUNK_DONE, CHUNK_NONE, 7, &[])].concat();
        let (answers, result) = fed(&mut replies, &bytes, 5);
        result.unwrap();
        assert_eq!(answers, [Answer { cookie: 7, given: Ok(Given::Bytes(b"\0\0\0d".to_vec())) }]);

        let mut replies = asked(true);
        let error = [&5u32.to_be_bytes()[..], &2u16.to_be_bytes(), b"no"].concat();
        let (answers, result) = fed(&mut replies, &chunk(0, CHUNK_ERROR | 1, 7, &error), 7);
        result.unwrap();
        assert!(answers.is_empty(), "more may come of it");
        let (answers, result) = fed(&mut replies, &data(CHUNK_DONE, 7, 100, b"ab"), 7);
        result.unwrap();
        assert_eq!(answers, [Answer { cookie: 7, given: Err(5) }]);
    }

    #[test]
    fn a_map_tells_zeros() {
        let mut replies = Replies::on(true, Some(5));
        replies.ask(1, Wanted::Map);
        let words = [5u32, 4096, 3, 512, 0, 1024, 1].map(u32::to_be_bytes).concat();
        let (answers, result) = fed(&mut replies, &chunk(CHUNK_DONE, CHUNK_BLOCK_STATUS, 1, &words), 3);
        result.unwrap();
        // A hole that is not said to be zeros may be anything.
        let runs = [(4096, true), (512, false), (1024, false)].map(|(len, zero)| Run { len, zero });
        assert_eq!(answers, [Answer { cookie: 1, given: Ok(Given::Map(runs.to_vec())) }]);
    }

    #[test]
    fn a_server_that_lies_is_found_out() {
        let body = |words: &[u32]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<_>>();
        let plain: &[(&str, Vec<u8>)] = &[
            ("no reply", vec![0; 16]),
            ("nothing that was asked", simple(0, 9)),
            ("not agreed on", data(CHUNK_DONE, 7, 100, b"abcd")),
            ("nothing that was asked", [simple(0, 8), simple(0, 8)].concat()),
        ];
        let structured: &[(&str, Vec<u8>)] = &[
            ("structured one has to be", simple(0, 7)),
            ("nothing that was asked", data(CHUNK_DONE, 6, 100, b"abcd")),
            ("were not asked for", data(CHUNK_DONE, 7, 99, b"abcd")),
            ("were not asked for", data(CHUNK_DONE, 7, 101, b"abcd")),
            ("were not asked for", data(CHUNK_DONE, 7, u64::MAX, b"abcd")),
            ("were not asked for", hole(0, 7, 100, 0)),
            ("were not asked for", hole(0, 7, 100, u32::MAX)),
            ("come twice", [data(0, 7, 100, b"ab"), data(0, 7, 101, b"bc")].concat()),
            ("come twice", [data(0, 7, 102, b"cd"), hole(0, 7, 100, 3)].concat()),
            ("not all bytes", data(CHUNK_DONE, 7, 100, b"abc")),
            ("not all bytes", chunk(CHUNK_DONE, CHUNK_NONE, 7, &[])),
            ("not belong", chunk(0, CHUNK_NONE, 7, &[])),
            ("not belong", chunk(CHUNK_DONE, CHUNK_NONE, 7, b"x")),
            ("not belong", data(0, 8, 100, b"a")),
            ("not belong", data(0, 7, 100, b"")),
            ("not belong", chunk(0, 77, 7, b"")),
            ("not belong", chunk(0, CHUNK_BLOCK_STATUS, 7, &body(&[5, 4, 0]))),
            ("not belong", chunk(0, CHUNK_ERROR | 1, 7, b"12345")),
            ("an error that is none", chunk(0, CHUNK_ERROR | 1, 7, &[0; 6])),
            ("two replies", [data(0, 7, 100, b"ab"), simple(5, 7)].concat()),
        ];
        for (is_structured, cases) in [(false, plain), (true, structured)] {
            for (why, bytes) in cases {
                for step in [1, 1000] {
                    let (_, result) = fed(&mut asked(is_structured), bytes, step);
                    let violation = result.expect_err(why).to_string();
                    assert!(violation.contains(why), "{why}: {violation}");
                }
            }
        }
        let maps: &[(&str, Vec<u8>)] = &[
            ("a map that was not asked for", body(&[4, 4096, 0])),
            ("run of nothing", body(&[5, 0, 0])),
            ("cut off", [body(&[5, 4096, 0]), vec![0; 4]].concat()),
        ];
        for (why, bytes) in maps {
            let mut replies = Replies::on(true, Some(5));
            replies.ask(1, Wanted::Map);
            let (_, result) = fed(&mut replies, &chunk(0, CHUNK_BLOCK_STATUS, 1, bytes), 9);
            assert!(result.expect_err(why).to_string().contains(why));
        }
        let mut replies = Replies::on(true, Some(5));
        replies.ask(1, Wanted::Map);
        let (_, result) = fed(&mut replies, &chunk(CHUNK_DONE, CHUNK_NONE, 1, &[]), 9);
        assert!(result.unwrap_err().to_string().contains("has not come"));
    }
}
