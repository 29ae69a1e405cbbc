//! A server that stands where the KMS is expected, and does what it is told: nothing, nonsense, errors, or
//! what the KMS behind it answers.

use crate::common::patience::limit;
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

/// What becomes of one request.
#[derive(Clone, Debug)]
pub enum Answer {
    /// None at all; the connection stays open.
    Silence,
    /// The connection is closed.
    HangUp,
    /// Bytes that are no HTTP.
    Garbage,
    /// An HTTP status and a body.
    Http(u16, String),
    /// What the server at this URL answers.
    Pass(String),
}

/// What the server has seen.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    /// A request: its head.
    Request(String),
    /// The client has closed a connection on which it waited for an answer.
    GaveUp,
}

/// The server. It ends with the test.
pub struct Faults {
    pub url: String,
    script: Arc<Mutex<Script>>,
    pub seen: Receiver<Seen>,
}

struct Script {
    first: VecDeque<Answer>,
    then: Answer,
}

impl Faults {
    /// Answers the first requests as `first` says, and all others as `then`.
    pub fn start(first: impl IntoIterator<Item = Answer>, then: Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let script = Arc::new(Mutex::new(Script { first: first.into_iter().collect(), then }));
        let (tell, seen) = channel();
        let shared = script.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (script, tell) = (shared.clone(), tell.clone());
                std::thread::spawn(move || serve(&stream, &script, &tell));
            }
        });
        Faults { url, script, seen }
    }

    /// From now on every request is answered so.
    pub fn now(&self, answer: Answer) {
        let mut script = self.script.lock().expect("not poisoned");
        script.first.clear();
        script.then = answer;
    }

    /// The next thing that it has seen.
    pub fn next(&self) -> Seen {
        self.seen.recv_timeout(limit()).expect("somebody asks")
    }

    /// The head of the next request.
    #[track_caller]
    pub fn head(&self) -> String {
        match self.next() {
            Seen::Request(head) => head,
            Seen::GaveUp => panic!("the client gave up"),
        }
    }
}

/// AWS's way to say an error.
pub fn exception(status: u16, name: &str, message: &str) -> Answer {
    Answer::Http(status, serde_json::json!({"__type": name, "message": message}).to_string())
}

/// A URL where nobody listens.
pub fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    format!("http://{}", listener.local_addr().expect("an address"))
}

fn serve(stream: &TcpStream, script: &Mutex<Script>, tell: &Sender<Seen>) {
    let mut reader = BufReader::new(stream);
    while let Some((head, body)) = message(&mut reader) {
        let _ = tell.send(Seen::Request(head.clone()));
        let answer = {
            let mut script = script.lock().expect("not poisoned");
            script.first.pop_front().unwrap_or_else(|| script.then.clone())
        };
        let bytes = match answer {
            Answer::HangUp => return,
            Answer::Silence => {
                let _ = reader.read_to_end(&mut Vec::new());
                let _ = tell.send(Seen::GaveUp);
                return;
            }
            Answer::Garbage => {
                let _ = (&mut &*stream).write_all(b"\x16\x03\x01 this is no HTTP\r\n\r\n");
                let _ = stream.shutdown(Shutdown::Write);
                return;
            }
            Answer::Http(status, body) => {
                // The header is for those who ask for a token of an instance's metadata.
                let token = "x-aws-ec2-metadata-token-ttl-seconds: 21600";
                let length = body.len();
                format!("HTTP/1.1 {status} x\r\n{token}\r\ncontent-length: {length}\r\n\r\n{body}")
                    .into_bytes()
            }
            Answer::Pass(url) => pass(&url, &head, &body),
        };
        if (&mut &*stream).write_all(&bytes).is_err() {
            return;
        }
    }
}

/// Hands a request on as it is, and brings back the answer.
fn pass(url: &str, head: &str, body: &[u8]) -> Vec<u8> {
    let mut upstream =
        TcpStream::connect(url.strip_prefix("http://").expect("a URL")).expect("connect to the KMS");
    upstream.write_all(head.as_bytes()).and_then(|()| upstream.write_all(body)).expect("hand it on");
    let (head, body) = message(&mut BufReader::new(&upstream)).expect("the KMS answers");
    [head.as_bytes(), &body].concat()
}

/// The next HTTP message: its head, with the empty line, and its body, which says how long it is.
fn message(reader: &mut impl BufRead) -> Option<(String, Vec<u8>)> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    Some((head, body))
}
