//! The side of whoever uses a store in a pool: it starts the process that reaches the pool, and asks it.
//!
//! What that one answers is a claim: it has librados, which speaks to a network. So each answer has a bound,
//! and is of the kind that was asked for.
#![forbid(unsafe_code)]

use super::COMMAND;
use super::wire::{Answer, Begin, MAX_LINE, MAX_RECORD, Request, is_name};
use crate::backing::nbd::Image;
use crate::base::root::records::{self, Locking, Pooled, Record, Records};
use crate::base::root::{Root, create_dir_durable};
use crate::base::sync::Locked;
use crate::base::wire::{self, Lines};
use crate::base::{Context, Error, Kind, Result, child, printable};
use crate::sandbox::stranger;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Mutex;
use std::time::Duration;

/// What the address of a store in a pool begins with.
const BEGINNING: &str = "ceph:";
/// How long one answer may take. Each operation of Ceph's has an end before that.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long the removal of an image may take, which is as many operations as that has objects.
const PATIENCE_WITH_REMOVAL: Duration = Duration::from_secs(6 * 3600);
/// Where the folders of this host are, unless the address says otherwise.
const STATE: &str = "pools";

/// The address of a store in a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Address {
    /// An image in the pool, of whatever name.
    image: Image,
    state: Option<PathBuf>,
}

impl Address {
    /// # Errors
    /// `Usage`, with what is wrong.
    fn parse(text: &str) -> Result<Self> {
        let refuse = |why: &str| {
            let message = format!(
                "{text:?} is no store in a pool: {why}; give \
                 ceph:POOL[/NAMESPACE][?id=ID&conf=/PATH&keyring=/PATH&state=/FOLDER]"
            );
            Error::new(Kind::Usage, message)
        };
        let whole = text.strip_prefix(BEGINNING).ok_or_else(|| refuse("it begins otherwise"))?;
        let (place, query) = whole.split_once('?').unwrap_or((whole, ""));
        let (own, ceph): (Vec<&str>, Vec<&str>) =
            query.split('&').filter(|pair| !pair.is_empty()).partition(|pair| pair.starts_with("state="));
        let state = match own[..] {
            [] => None,
            [one] => Some(PathBuf::from(&one["state=".len()..])),
            _ => return Err(refuse("it says \"state\" twice")),
        };
        if state.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err(refuse("the path of the folder is to begin with a slash"));
        }
        let query = if ceph.is_empty() { String::new() } else { format!("?{}", ceph.join("&")) };
        let image = Image::named(&format!("rbd:{place}/x{query}")).map_err(|e| {
            let text = e.to_string();
            let why = text.rsplit("RBD image: ").next().unwrap_or(&text);
            // How an image is named is no help here.
            refuse(if why.starts_with("give ") {
                "it names no pool, or something that is not known"
            } else {
                why
            })
        })?;
        Ok(Address { image, state })
    }

    /// What it is called among all pools of all clusters, as a name of a file.
    fn id(&self, fsid: &str) -> String {
        let place = [self.image.pool(), self.image.namespace()];
        let place = place.into_iter().filter(|name| !name.is_empty()).map(as_file_name);
        std::iter::once(fsid.to_owned()).chain(place).collect::<Vec<_>>().join("+")
    }

    fn shown(&self) -> String {
        let whole = self.image.shown();
        format!("{BEGINNING}{}", whole.strip_suffix("/x").unwrap_or(&whole))
    }

    /// What stands before and after the name of an image in its address.
    fn around(&self) -> (String, String) {
        let whole = self.image.to_string();
        let (place, query) = whole
            .split_once('?')
            .map_or((&*whole, String::new()), |(place, query)| (place, format!("?{query}")));
        (place.strip_suffix('x').unwrap_or(place).to_owned(), query)
    }
}

/// A name of Ceph's as a part of a file's name, which is no other name's.
fn as_file_name(name: &str) -> String {
    let as_it_is = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    name.bytes().fold(String::new(), |text, byte| match as_it_is(byte) {
        true => text + &char::from(byte).to_string(),
        false => format!("{text}%{byte:02x}"),
    })
}

/// Whether this is meant to be the address of a store in a pool.
pub fn is_pool(text: &str) -> bool {
    text.starts_with(BEGINNING)
}

/// Reaches the store in a pool that `text` is the address of, for the rest of this process's life. Returns
/// what this host has of it.
///
/// # Errors
/// `Usage` for what is no such address; what is in the way, in words for whoever looks after Ceph.
pub fn open(text: &str) -> Result<Root> {
    let address = Address::parse(text)?;
    let (client, fsid) = Client::start(&address).context(|| address.shown())?;
    let id = address.id(&fsid);
    let folder = match &address.state {
        Some(state) => state.join(&id),
        None => Root::default_path()?.join(STATE).join(&id),
    };
    create_dir_durable(&folder)?;
    let root = Root::new(&folder);
    let records = Box::new(client);
    let (shown, image) = (address.shown(), address.around());
    records::use_pool(Pooled { root: root.path().to_owned(), id, shown, image, records });
    Ok(root)
}

/// The other process, as this one has it.
struct Client(Mutex<Conversation>);

struct Conversation {
    socket: UnixStream,
    lines: Lines,
    child: Option<Child>,
    /// What it says from now on could be the answer to something else.
    is_broken: bool,
}

impl Client {
    fn start(address: &Address) -> Result<(Client, String)> {
        let (socket, child) = child::spawn_lasting(&Root::new("/"), COMMAND, stranger::keep_back)?;
        let client = Client::over(socket, Some(child))?;
        let begin = Begin { image: address.image.to_string() };
        match client.say_and_hear(&begin)? {
            Answer::Ready(fsid) if fsid.len() <= 64 && is_name(&fsid) => Ok((client, fsid)),
            other => Err(unexpected(other).into()),
        }
    }

    fn over(socket: UnixStream, child: Option<Child>) -> Result<Client> {
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let lines = Lines::of_at_most(MAX_LINE);
        Ok(Client(Mutex::new(Conversation { socket, lines, child, is_broken: false })))
    }

    fn say_and_hear(&self, what: &impl serde::Serialize) -> io::Result<Answer> {
        let mut talk = self.0.locked();
        let ended = |why: &dyn std::fmt::Display| {
            let message =
                format!("the {COMMAND} helper has ended, by which the store's records are reached ({why})");
            io::Error::new(ErrorKind::BrokenPipe, message)
        };
        if talk.is_broken {
            return Err(ended(&"before this"));
        }
        talk.is_broken = true;
        wire::say(&talk.socket, what).map_err(|e| ended(&e))?;
        let Conversation { socket, lines, .. } = &mut *talk;
        let line = lines.next(socket).map_err(|e| ended(&e))?.ok_or_else(|| ended(&"just now"))?;
        let answer = serde_json::from_slice(&line).map_err(|_| strange())?;
        talk.is_broken = false;
        Ok(answer)
    }

    fn ask(&self, request: &Request) -> io::Result<Answer> {
        match self.say_and_hear(request)? {
            Answer::Failed(problem, why) => Err(problem.error(printable::line(&why).into_owned())),
            answer => Ok(answer),
        }
    }

    fn have_done(&self, request: &Request) -> io::Result<()> {
        match self.ask(request)? {
            Answer::Done => Ok(()),
            other => Err(unexpected(other)),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let mut talk = self.0.locked();
        let _ = talk.socket.shutdown(Shutdown::Both);
        if let Some(child) = &mut talk.child {
            let _ = child.wait();
        }
    }
}

fn strange() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("the {COMMAND} helper answers strangely"))
}

/// What another answer than was wanted means.
fn unexpected(answer: Answer) -> io::Error {
    match answer {
        Answer::Failed(problem, why) => problem.error(printable::line(&why).into_owned()),
        _ => strange(),
    }
}

fn text_of(bytes: &[u8]) -> io::Result<String> {
    if bytes.len() > MAX_RECORD {
        let message = format!("it has {} bytes, and a record in a pool may have {MAX_RECORD}", bytes.len());
        return Err(io::Error::new(ErrorKind::InvalidInput, message));
    }
    String::from_utf8(bytes.to_owned()).map_err(|e| io::Error::new(ErrorKind::InvalidInput, e))
}

fn names(record: Record<'_>) -> (String, String) {
    (record.folder.to_owned(), record.file.to_owned())
}

impl Records for Client {
    fn read(&self, record: Record<'_>, max: u64) -> io::Result<Vec<u8>> {
        let (folder, file) = names(record);
        match self.ask(&Request::Read { folder, file })? {
            Answer::Text(text) if text.len() as u64 <= max => Ok(text.into_bytes()),
            Answer::Text(_) => {
                Err(super::wire::Problem::Corrupt.error(format!("it is longer than {max} bytes")))
            }
            other => Err(unexpected(other)),
        }
    }

    fn names(&self, folder: &str) -> io::Result<Vec<String>> {
        match self.ask(&Request::Names { folder: folder.to_owned() })? {
            Answer::Names(names) if names.iter().all(|name| is_name(name)) => Ok(names),
            other => Err(unexpected(other)),
        }
    }

    fn create(&self, record: Record<'_>, bytes: &[u8]) -> io::Result<()> {
        let (folder, file) = names(record);
        self.have_done(&Request::Create { folder, file, text: text_of(bytes)? })
    }

    fn replace(&self, record: Record<'_>, bytes: &[u8]) -> io::Result<()> {
        let (folder, file) = names(record);
        self.have_done(&Request::Replace { folder, file, text: text_of(bytes)? })
    }

    fn remove(&self, record: Record<'_>) -> io::Result<()> {
        let (folder, file) = names(record);
        self.have_done(&Request::Remove { folder, file })
    }

    fn rename(&self, record: Record<'_>, to: &str) -> io::Result<()> {
        let (folder, file) = names(record);
        self.have_done(&Request::Rename { folder, file, to: to.to_owned() })
    }

    fn make_folder(&self, folder: &str) -> io::Result<()> {
        self.have_done(&Request::MakeFolder { folder: folder.to_owned() })
    }

    fn remove_folder(&self, folder: &str) -> io::Result<()> {
        self.have_done(&Request::RemoveFolder { folder: folder.to_owned() })
    }

    fn lock(&self, name: &str, text: &str) -> io::Result<Locking> {
        match self.ask(&Request::Lock { name: name.to_owned(), holder: text.to_owned() })? {
            Answer::Done => Ok(Locking::Taken),
            Answer::Anothers(who) => Ok(Locking::Anothers(who)),
            other => Err(unexpected(other)),
        }
    }

    fn unlock(&self, name: &str) -> io::Result<()> {
        self.have_done(&Request::Unlock { name: name.to_owned() })
    }

    fn holder(&self, name: &str) -> io::Result<Option<String>> {
        match self.ask(&Request::Holder { name: name.to_owned() })? {
            Answer::HeldBy(who) => Ok(who),
            other => Err(unexpected(other)),
        }
    }

    fn break_lock(&self, name: &str, text: &str) -> io::Result<()> {
        self.have_done(&Request::BreakLock { name: name.to_owned(), holder: text.to_owned() })
    }

    fn remove_image(&self, name: &str) -> io::Result<()> {
        let patience = |time| self.0.locked().socket.set_read_timeout(Some(time));
        patience(PATIENCE_WITH_REMOVAL)?;
        let removed = self.have_done(&Request::RemoveImage { name: name.to_owned() });
        patience(PATIENCE).and(removed)
    }

    fn make_image_longer(&self, name: &str, len: u64) -> io::Result<()> {
        self.have_done(&Request::MakeImageLonger { name: name.to_owned(), len })
    }

    fn narrow(&self, folder: &str, layers: &[String]) -> io::Result<()> {
        self.have_done(&Request::Narrow { folder: folder.to_owned(), layers: layers.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn an_address_is_a_pool_and_how_it_is_reached() {
        let text = "ceph:p/n?id=h&conf=/x&keyring=/k&state=/s";
        let address = Address::parse(text).unwrap();
        assert_eq!(address.shown(), "ceph:p/n");
        assert_eq!(address.state, Some("/s".into()));
        let around = ("rbd:p/n/".to_owned(), "?id=h&conf=/x&keyring=/k".to_owned());
        assert_eq!(address.around(), around);
        assert_eq!(address.id("f"), "f+p+n");
        let plain = Address::parse("ceph:a+b").unwrap();
        assert_eq!((plain.id("f"), plain.around()), ("f+a%2bb".into(), ("rbd:a%2Bb/".into(), "".into())));
        for (text, why) in [
            ("ceph:", "POOL"),
            ("ceph:p/n/x", "POOL"),
            ("ceph:p?key=1", "POOL"),
            ("ceph:p?state=x", "begin with a slash"),
            ("ceph:p?state=/x&state=/y", "twice"),
            ("ceph:p?id=client.a", "without \"client.\""),
        ] {
            let refused = Address::parse(text).unwrap_err();
            assert_eq!(refused.kind(), Kind::Usage, "{text}");
            assert!(refused.to_string().contains(why), "{text}: {refused}");
        }
    }

    /// A client whose other side says this, whatever it is asked.
    fn told(answers: &[u8]) -> Client {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let answers = answers.to_owned();
        std::thread::spawn(move || {
            let _ = (&theirs).write_all(&answers);
            let mut lines = Lines::of_at_most(MAX_LINE);
            while let Ok(Some(_)) = lines.next(&theirs) {}
        });
        Client::over(ours, None).unwrap()
    }

    const RECORD: Record<'static> = Record { folder: "ledger", file: "x.json" };

    #[test]
    fn what_is_no_answer_to_the_question_is_an_error() {
        for answer in [&b"\"done\"\n"[..], b"{\"names\":[]}\n", b"{\"text\":7}\n", b"\xff\n", b"\n"] {
            assert!(told(answer).read(RECORD, 100).is_err(), "{answer:?}");
        }
        for names in ["[\"..\"]", "[\"a/b\"]", "[\"\"]", "[7]"] {
            let answer = format!("{{\"names\":{names}}}\n");
            assert!(told(answer.as_bytes()).names("ledger").is_err(), "{names}");
        }
        let long = told(b"{\"text\":\"four\"}\n").read(RECORD, 3).unwrap_err();
        assert_eq!(Error::from(long).kind(), Kind::Corrupt);
        assert_eq!(told(b"{\"text\":\"four\"}\n").read(RECORD, 4).unwrap(), b"four");
        let e = told(b"{\"failed\":[\"not-found\",\"a\\u001b\"]}\n").read(RECORD, 4).unwrap_err();
        assert!(e.kind() == ErrorKind::NotFound && !e.to_string().contains('\u{1b}'), "{e}");
    }

    #[test]
    fn who_has_answered_strangely_is_asked_nothing_more() {
        let client = told(b"nonsense\n{\"text\":\"late\"}\n");
        assert!(client.read(RECORD, 100).is_err());
        let again = client.read(RECORD, 100).unwrap_err();
        assert_eq!(again.kind(), ErrorKind::BrokenPipe, "an answer would be to something else");
        // A line that never ends is cut.
        let mut endless = vec![b'x'; MAX_LINE + 1];
        endless.push(b'\n');
        assert!(told(&endless).read(RECORD, 100).is_err());
    }
}
