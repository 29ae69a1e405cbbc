//! Arguments, variables and paths that nobody would give on purpose: whatever they are, a command says what
//! is wrong with them, or does what it was told, and never panics.

use crate::common::patience::limit;
use crate::common::process::{limit_resource, tie_to_test, wait_within};
use nix::sys::resource::Resource;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A store whose root, like everything else about it, is no text.
struct Odd {
    dir: tempfile::TempDir,
}

/// How a command ended: its exit code, and what it said on standard output and standard error.
struct Ended {
    code: i32,
    out: String,
    err: String,
}

fn not_text(name: &[u8]) -> OsString {
    OsStr::from_bytes(&[name, b"\xff\xfe"].concat()).to_owned()
}

impl Odd {
    fn new() -> Self {
        Odd { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(not_text(name.as_bytes()))
    }

    fn command<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealblk"));
        command.args(arguments).current_dir(self.dir.path());
        command.env("SEALBLK_ROOT", self.path("root")).env("SEALBLK_CONFIG_DIR", self.path("config"));
        command.env_remove("RUST_LOG");
        command
    }

    /// Runs a command to its end, which must be neither a panic nor a signal.
    #[track_caller]
    fn run(&self, mut command: Command) -> Ended {
        let file = |name: &str| File::create(self.dir.path().join(name)).unwrap();
        command.stdin(Stdio::null()).stdout(file("out")).stderr(file("err"));
        tie_to_test(&mut command, vec![]);
        let mut child = command.spawn().unwrap();
        let ended = wait_within(&mut child, limit());
        let _ = child.kill();
        let text =
            |name: &str| String::from_utf8_lossy(&fs::read(self.dir.path().join(name)).unwrap()).into_owned();
        let (out, err) = (text("out"), text("err"));
        let status = ended.unwrap_or_else(|e| panic!("{command:?}: {e}: {out}{err}"));
        let code = status.code().unwrap_or_else(|| panic!("{command:?}: {status}: {out}{err}"));
        assert!(code != 101 && !err.contains("panicked"), "{command:?}: {status}: {err}");
        Ended { code, out, err }
    }

    /// Runs a command that must succeed.
    #[track_caller]
    fn ok<A: AsRef<OsStr>>(&self, arguments: &[A]) -> String {
        let ended = self.run(self.command(arguments));
        assert_eq!(ended.code, 0, "{:?}: {}", self.command(arguments), ended.err);
        ended.out
    }
}

fn words(text: &str) -> Vec<OsString> {
    text.split_whitespace().map(OsString::from).collect()
}

#[test]
fn a_store_whose_path_is_no_text_does_all_that_another_does() {
    let odd = Odd::new();
    for (command, file) in [
        ("volume create --size 1MiB --name db", None),
        ("volume create --size 1MiB --name other --unencrypted", None),
        ("volume export db", Some("exported")),
        ("volume import --name imported", Some("exported")),
        ("volume show db", None),
        ("volume list", None),
        ("snapshot create db", None),
        ("snapshot list", None),
        ("volume tag db team=a", None),
        ("volume rewrap --all", None),
        ("volume resize db --size 2MiB", None),
        ("volume rekey other", None),
        ("key list", None),
        ("settings show", None),
        ("audit show", None),
        ("audit verify", None),
        ("events", None),
        ("gc", None),
        ("doctor", None),
        ("volume delete imported --shred --yes", None),
    ] {
        for json in [false, true] {
            let mut arguments = words(command);
            arguments.extend(file.map(|file| odd.path(file).into_os_string()));
            arguments.extend(json.then(|| "--json".into()));
            // The second time some of them have nothing left to do, and say so.
            odd.run(odd.command(&arguments));
        }
    }
    // They did do something.
    assert!(odd.ok(&words("volume list")).contains("db"));
    let shown = odd.ok(&words("volume show db --json"));
    assert!(shown.contains(&format!("{}", Path::new("root\u{fffd}\u{fffd}").display())), "{shown}");
    assert!(odd.ok(&words("audit show")).lines().count() > 4);
}

/// Every command that there is, as help tells, with its words.
fn commands(odd: &Odd, above: &[String], all: &mut Vec<Vec<String>>) {
    let help: Vec<String> = above.iter().cloned().chain(["--help".into()]).collect();
    let help = odd.ok(&help);
    let below: Vec<String> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        // What goes on in the next line is further in.
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next().map(String::from))
        .filter(|name| name != "help")
        .collect();
    if below.is_empty() {
        return all.push(above.to_vec());
    }
    for name in below {
        commands(odd, &[above, &[name]].concat(), all);
    }
}

#[test]
fn no_command_panics_whatever_its_arguments_are() {
    let odd = Odd::new();
    let mut all = Vec::new();
    commands(&odd, &[], &mut all);
    assert!(all.len() > 40, "{all:?}");
    let long = "9".repeat(5000);
    let arguments: [OsString; 8] = [
        not_text(b""),
        not_text(b"--"),
        "".into(),
        "-".into(),
        "\u{202e}\0".trim_end_matches('\0').into(),
        "18446744073709551615".into(),
        long.clone().into(),
        format!("alias/{long}").into(),
    ];
    for command in &all {
        // How many a command takes is not known: none, one, two, three.
        for count in 0..=3 {
            for argument in arguments.iter().take(if count == 0 { 1 } else { arguments.len() }) {
                // These serve until they are ended.
                if count == 0
                    && ["kms serve", "events deliver", "watch"].contains(&command.join(" ").as_str())
                {
                    continue;
                }
                let mut words: Vec<OsString> = command.iter().map(OsString::from).collect();
                words.extend(vec![argument.clone(); count]);
                odd.run(odd.command(&words));
            }
        }
    }
}

#[test]
fn no_variable_makes_a_command_panic() {
    let odd = Odd::new();
    let all = [
        "SEALBLK_ROOT",
        "SEALBLK_CONFIG_DIR",
        "RUST_LOG",
        "HOME",
        "XDG_DATA_HOME",
        "XDG_CONFIG_HOME",
        "NOTIFY_SOCKET",
        "AWS_REGION",
        "AWS_CA_BUNDLE",
        "AWS_ENDPOINT_URL",
        "CREDENTIALS_DIRECTORY",
        "SEALBLK_KMS_PASSPHRASE_FD",
        "TMPDIR",
        "TERM",
        "COLUMNS",
        "LC_ALL",
        "SUDO_USER",
    ];
    for variable in all {
        for value in [not_text(b"/nowhere"), "".into(), "\n".into(), "9".repeat(5000).into()] {
            for command in ["volume list", "doctor", "volume create --size 1MiB", "attach x --socket-path s"]
            {
                let mut command = odd.command(&words(command));
                command.env(variable, &value);
                odd.run(command);
            }
        }
    }
}

/// "ulimit -f" sends a signal, by which programs die that know nothing of it.
#[test]
fn a_limit_on_the_size_of_files_is_an_error_in_words() {
    let odd = Odd::new();
    let mut command = odd.command(&words("volume create --size 64MiB --name db"));
    limit_resource(&mut command, Resource::RLIMIT_FSIZE, 1 << 20, 1 << 20);
    let ended = odd.run(command);
    assert!(ended.code == 1 && ended.err.contains("File too large"), "{}: {}", ended.code, ended.err);
    assert!(!odd.ok(&words("volume list")).contains("db"));
    odd.ok(&words("volume create --size 64MiB --name db"));
}
