//! Commands that cannot look at the host process: from another PID namespace, or where /proc hides processes.
//! They find the process that has the volume, and nobody who only answers in its place.

use crate::common::attach::{Host, Place, open, read, write};
use crate::common::disk::pattern;
use crate::ends;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::chown;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

const NOBODY: u32 = 65534;

/// Has /proc hide processes, as on hardened hosts, and in containers from a root without the capability to
/// look at others' all the same.
const HIDE: &str = "mount -t proc -o hidepid=2 proc /proc && exec setpriv --bounding-set=-sys_ptrace \"$@\"";

/// Where a program is run.
#[derive(Clone, Copy, Debug)]
enum From {
    /// Where this test is.
    Here,
    /// In a PID namespace with a /proc of its own.
    Namespace,
    /// In a PID namespace with the /proc of the one above.
    StrangeProc,
    /// Where /proc hides processes.
    Hidden,
}

impl From {
    fn run(self, sealblk: &Command) -> Command {
        let before: &[&str] = match self {
            From::Here => &["env"],
            From::Namespace => &["unshare", "-pf", "--kill-child", "--mount-proc"],
            From::StrangeProc => &["unshare", "-pf", "--kill-child"],
            From::Hidden => &["unshare", "-m", "sh", "-c", HIDE, "sh"],
        };
        let mut command = Command::new(before[0]);
        command.args(&before[1..]).arg(sealblk.get_program()).args(sealblk.get_args());
        for (name, value) in sealblk.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    }

    fn attach(self, place: &Place) -> Host {
        place.start(self.run(&place.attach_command(&[])), vec![])
    }

    fn sealblk(self, place: &Place, arguments: &[&str]) -> (i32, String) {
        let mut command = place.store.command();
        ends(self.run(command.args(arguments)))
    }

    #[track_caller]
    fn ok(self, place: &Place, arguments: &[&str]) -> String {
        let (code, said) = self.sealblk(place, arguments);
        assert_eq!(code, 0, "{arguments:?} from {self:?}: {said}");
        said
    }
}

/// Everything that an attached volume can be asked for, and at last the detach.
fn ask_for_everything(place: &Place, from: From) {
    from.ok(place, &["throttle", "t", "--iops", "100000"]);
    let larger = (place.metadata().size() + (1 << 20)).to_string();
    from.ok(place, &["volume", "resize", "t", &larger]);
    from.ok(place, &["snapshot", "create", "t"]);
    from.ok(place, &["volume", "rewrap", "t", "--key", "alias/aws/ebs"]);
    from.ok(place, &["volume", "rekey", "t", "--follow"]);
    from.ok(place, &["snapshot", "create", "t"]);
    from.ok(place, &["volume", "flatten", "t", "--follow"]);
    from.ok(place, &["detach", "t"]);
}

#[test]
fn an_attached_volume_is_asked_from_every_namespace() {
    let place = Place::new(&[]);
    let pairs = [
        (From::Here, From::Namespace, true),
        (From::Here, From::StrangeProc, true),
        (From::Here, From::Hidden, false),
        (From::Namespace, From::Here, true),
        (From::StrangeProc, From::Here, true),
        (From::Namespace, From::Namespace, true),
        (From::Hidden, From::Hidden, false),
    ];
    for (round, (host_is, from, is_elsewhere)) in (0..).zip(pairs) {
        let host = host_is.attach(&place);
        let mut session = open(&place.socket());
        if round > 0 {
            assert!(read(&mut session.rings[0], 0, 8192) == pattern(round, 8192));
        }
        write(&mut session.rings[0], 0, &pattern(round + 1, 8192));
        let shown = from.ok(&place, &["volume", "show", "t"]);
        let said = shown.contains("of another PID namespace, on the host ");
        assert_eq!(said, is_elsewhere, "{host_is:?} {from:?}: {shown}");
        let (code, said) = from.sealblk(&place, &["volume", "delete", "t"]);
        assert!(code == 4 && said.contains("is attached by process"), "{host_is:?} {from:?}: {code}: {said}");
        ask_for_everything(&place, from);
        drop(session);
        host.ends_well();
    }
}

/// What is sent to who asks for the lock.
type Show = fn(&Path) -> Option<File>;

/// What a client says first to one who answers in the host process's place, and shows it this.
fn overheard(listener: &UnixListener, show: Option<File>) -> String {
    let (client, _) = listener.accept().unwrap();
    let mut heard = BufReader::new(&client);
    let mut line = String::new();
    heard.read_line(&mut line).unwrap();
    let fds: Vec<_> = show.iter().map(|file| file.as_raw_fd()).collect();
    let control = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &control[..] };
    sendmsg::<()>(client.as_raw_fd(), &[IoSlice::new(b"\"lock\"\n")], control, MsgFlags::empty(), None)
        .unwrap();
    // And what after that.
    let _ = heard.read_to_string(&mut line);
    line
}

#[test]
fn who_answers_in_the_place_of_a_process_that_cannot_be_seen_is_told_nothing() {
    let place = Place::new(&[]);
    place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "other"]);
    let host = place.attach(&[]);
    let folder = place.volume_folder();
    let (socket, aside) = (folder.join("control.sock"), folder.join("aside.sock"));
    fs::rename(&socket, &aside).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    let shown: [(&str, Show); 4] = [
        ("nothing", |_| None),
        ("its own open file", |folder| {
            Some(File::options().read(true).write(true).open(folder.join("lock")).unwrap())
        }),
        ("another file", |folder| Some(File::open(folder.join("volume.json")).unwrap())),
        ("no file", |_| Some(File::open("/dev/null").unwrap())),
    ];
    for (what, show) in shown {
        for from in [From::Namespace, From::Hidden] {
            let (listener, file) = (listener.try_clone().unwrap(), show(&folder));
            let answering = std::thread::spawn(move || overheard(&listener, file));
            let (code, said) = from.sealblk(&place, &["detach", "t"]);
            assert!(code == 4 && said.contains("does not have the volume"), "{what}: {code}: {said}");
            assert_eq!(answering.join().unwrap().trim_end(), "{\"op\":\"show-lock\"}", "{what}");
        }
    }
    fs::remove_file(&socket).unwrap();
    fs::rename(&aside, &socket).unwrap();
    From::Namespace.ok(&place, &["detach", "t"]);
    host.ends_well();
}

/// A host process of before, which shows nothing, and is not at hand to be looked at.
#[test]
fn a_process_that_does_not_know_the_question_is_told_nothing_more() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let folder = place.volume_folder();
    let (socket, aside) = (folder.join("control.sock"), folder.join("aside.sock"));
    fs::rename(&socket, &aside).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    let answering = std::thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&client).read_line(&mut line).unwrap();
        let answer = b"{\"failed\":{\"kind\":\"usage\",\"message\":\"unknown variant\"}}\n";
        std::io::Write::write_all(&mut &client, answer).unwrap();
        line
    });
    let (code, said) = From::Namespace.sealblk(&place, &["detach", "t"]);
    assert!(
        code == 4 && said.contains("unknown variant") && said.contains("run this where"),
        "{code}: {said}"
    );
    assert_eq!(answering.join().unwrap().trim_end(), "{\"op\":\"show-lock\"}");
    fs::remove_file(&socket).unwrap();
    fs::rename(&aside, &socket).unwrap();
    host.end();
}

/// Makes `path` and all below it nobody's.
fn give(path: &Path) {
    chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    if path.is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| give(&entry.unwrap().path()));
    }
}

/// Asks a host process for its lock, and prints the answer and how many descriptors came with it.
const ASK: &str = "import json, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.sendall(b'{\"op\":\"show-lock\"}\\n')
answer, descriptors, flags, address = socket.recv_fds(s, 4096, 4)
print(json.dumps([json.loads(answer), len(descriptors)]))";

/// Who had it could pass for the host process, and let go of its lock.
#[test]
fn the_lock_is_shown_to_root_alone() {
    let place = Place::new(&[]);
    place.store.let_belong_to("nobody");
    give(&place.store.root());
    fs::set_permissions(place.folder(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let host = place.attach(&["--user", "nobody"]);
    let ask = |user: u32| -> Value {
        let mut python = Command::new("python3");
        python.args(["-c", ASK]).arg(place.volume_folder().join("control.sock"));
        let output = std::os::unix::process::CommandExt::uid(&mut python, user).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
    };
    assert_eq!(ask(0), serde_json::json!(["lock", 1]));
    let others = ask(NOBODY);
    assert_eq!(others[1], 0, "{others}");
    assert!(others[0]["failed"]["message"].as_str().unwrap().contains("root alone"), "{others}");
    From::Namespace.ok(&place, &["detach", "t"]);
    host.ends_well();
}

#[test]
fn an_ordinary_user_reaches_the_host_process_where_proc_hides_it() {
    let place = Place::new(&[]);
    let folder = place.folder();
    let program = folder.join("sealblk");
    // By another process: a child that another test starts meanwhile would inherit our descriptor, and a file
    // that somebody has open for writing cannot be executed.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_sealblk")).arg(&program).status();
    assert!(copied.expect("start cp").success(), "copy the program to where he can read it");
    let run = place.socket().parent().unwrap().to_owned();
    give(&folder);
    give(&run);
    let his = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program).args(arguments);
        command.env("SEALBLK_CONFIG_DIR", place.store.config()).env("SEALBLK_ROOT", place.store.root());
        From::Hidden.run(&command)
    };
    let ok = |arguments: &[&str]| {
        let (code, said) = ends(his(arguments));
        assert_eq!(code, 0, "{arguments:?}: {said}");
        said
    };
    let socket = place.socket();
    let host = place.start(his(&["attach", "t", "--socket-path", socket.to_str().unwrap()]), vec![]);
    assert!(ok(&["volume", "show", "t"]).contains(&format!("by process {}", host.pid())));
    ok(&["throttle", "t", "--iops", "1000"]);
    ok(&["volume", "resize", "t", "16MiB"]);
    ok(&["snapshot", "create", "t"]);
    ok(&["detach", "t"]);
    host.ends_well();
}
