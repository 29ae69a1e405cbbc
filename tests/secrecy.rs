//! The data key is nowhere but in the memory that is made for it: not in the host process's other memory, not
//! in a core, not in what the helper leaves behind, not in any file, log, argument or environment.
//!
//! A program of its own: one test raises the limit on the size of cores, which holds for the whole process.

mod common;

use crate::common::attach::{Host, Place, flush, open, read, write};
use crate::common::disk::pattern;
use crate::common::frontend::{Framing, Request, Segment, Session, block};
use crate::common::helpers::children;
use crate::common::kms_server::{KmsServer, set};
use crate::common::leaks::{Needles, look_through};
use crate::common::patience::{limit, wait_for};
use crate::common::process::{INHERITED, inherit, tie_to_test, wait_within};
use crate::common::softhsm::{SoftHsm, give_pin};
use crate::common::store::{Store, said};
use crate::common::trace::Traced;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::signal::{self, Signal};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::Pid;
use sealblk::crypt::SecretFd;
use sealblk::crypt::xts::Engine;
use sealblk::kms::KeyProvider;
use sealblk::kms::embedded::keys::{LogKeys, RootKey};
use sealblk::kms::embedded::log::{HEADER_LEN, Header, Next, next_record};
use sealblk::kms::embedded::records::{Change, Transaction};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::fs::{self, File};
use std::io::{IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};

const SERIAL: &str = "needle-in-haystack-1";

/// Nothing of the key is in the memory of the host process that root can read; and the
/// search finds what is there.
#[track_caller]
fn assert_not_in_memory(host: &Host, needles: &Needles, when: &str) {
    let control = Needles::words(SERIAL);
    let look = || (look_through(host.pid(), needles), look_through(host.pid(), &control));
    let (seen, control) = host.frozen(look);
    assert!(seen.found.is_empty(), "{when}: {:#?}", seen.found);
    assert!(seen.secret > 0, "{when}: where is the key?");
    assert!(seen.bytes > 10 << 20, "{when}: only {} bytes were looked through", seen.bytes);
    assert!(!control.found.is_empty(), "{when}: the search does not find the serial either");
}

/// Requests of every sort, so that each piece of code that has to do with the key has run.
fn use_disk(session: &mut Session) {
    let ring = &mut session.rings[0];
    for (n, len) in [(0, 4096), (1, 65536), (2, 1 << 20)] {
        let data = pattern(n, len);
        write(ring, 4096 * n, &data);
        assert!(read(ring, 4096 * n, len) == data);
    }
    let scattered = Request::write(1024, &pattern(7, 65536)).framed(Framing::Scattered(vec![1000, 3000]));
    assert_eq!(scattered.run(ring).expect("it completes").status, block::OK);
    let zeroes = Request::write_zeroes(&[Segment { sector: 1032, count: 8, flags: 1 }]);
    assert_eq!(zeroes.run(ring).expect("it completes").status, block::OK);
    // Decrypted in part, since a part is absent.
    assert_eq!(read(ring, 1024, 65536)[8 * 512..16 * 512], [0; 8 * 512]);
    flush(ring);
}

fn key_stays_in_its_memory(engine: &str) {
    for sector_size in ["512", "4096"] {
        let place = Place::new(&["--sector-size", sector_size]);
        let needles = Needles::of_key(&place.dek());
        let arguments = ["--serial", SERIAL, "--xts-engine", engine, "--queues", "2"];
        for attach in ["first", "second"] {
            let when = |what| format!("{what}, {attach} attach, engine {engine}, sectors of {sector_size}");
            let host = place.attach(&arguments);
            assert_not_in_memory(&host, &needles, &when("attached"));
            let mut session = open(&place.socket());
            use_disk(&mut session);
            assert_not_in_memory(&host, &needles, &when("in use"));
            drop(session);
            // Another connection: what the first one left is reached now, if it can be.
            drop(open(&place.socket()));
            assert_not_in_memory(&host, &needles, &when("after a VMM"));
            host.end();
        }
    }
}

/// Those that this CPU can run and that are not taken by themselves: without VAES there is none.
fn other_engines() -> impl Iterator<Item = &'static str> {
    Engine::available().into_iter().skip(1).map(Engine::name)
}

#[test]
fn the_key_is_in_no_memory_but_its_own() {
    key_stays_in_its_memory("auto");
}

#[test]
fn the_key_is_in_no_memory_but_its_own_with_any_other_engine() {
    other_engines().for_each(key_stays_in_its_memory);
}

/// What is in a register is in memory after the next signal and when glibc binds a function,
/// and in every new thread.
fn key_stays_out_of_registers(engine: &str) {
    let place = Place::new(&[]);
    let needles = Needles::of_key(&place.dek());
    let host = place.attach(&["--xts-engine", engine, "--queues", "2"]);
    let mut session = open(&place.socket());
    use_disk(&mut session);
    let mut found = Vec::new();
    for thread in fs::read_dir(host.proc("task")).expect("list the threads") {
        let thread = thread.expect("list the threads").path();
        let name = fs::read_to_string(thread.join("comm")).expect("its name").trim_end().to_owned();
        let id = thread.file_name().and_then(|name| name.to_str()?.parse().ok()).expect("a number");
        let traced = Traced::seize(Pid::from_raw(id), 0);
        traced.interrupt();
        let registers = traced.vector_registers();
        assert!(
            registers.len() > 512,
            "thread {name}: there are more registers than {} bytes",
            registers.len()
        );
        let here = needles.find(&registers);
        found.extend(here.into_iter().map(|(what, at)| format!("thread {name}: {what}, byte {at}")));
    }
    assert!(found.is_empty(), "engine {engine}: {found:#?}");
    host.end();
}

#[test]
#[cfg(target_arch = "x86_64")]
fn the_key_is_in_no_register() {
    key_stays_out_of_registers("auto");
}

#[test]
#[cfg(target_arch = "x86_64")]
fn the_key_is_in_no_register_with_any_other_engine() {
    other_engines().for_each(key_stays_out_of_registers);
}

/// The old data key goes when nothing needs it any more, and the new one never is where it could be found.
#[test]
fn of_a_volume_that_is_rekeyed_neither_key_is_in_memory_and_the_old_one_goes() {
    let place = Place::new(&[]);
    let old = Needles::of_key(&place.dek());
    let host = place.attach(&["--serial", SERIAL, "--queues", "2", "--hydrate-rate", "1"]);
    let mut session = open(&place.socket());
    use_disk(&mut session);
    let secret = || host.frozen(|| look_through(host.pid(), &old).secret);
    let before = secret();
    place.store.ok(&["volume", "rekey", "t"]);
    use_disk(&mut session);
    assert!(secret() > before, "it has both");
    place.store.ok(&["throttle", "t", "--hydrate-rate", "0"]);
    place.store.ok(&["volume", "flatten", "t", "--follow"]);
    let new = Needles::of_key(&place.dek());
    use_disk(&mut session);
    for (what, needles) in [("the old key", &old), ("the new key", &new)] {
        assert_not_in_memory(&host, needles, what);
    }
    // Only what there was for one key is there for one key.
    assert_eq!(secret(), before);
    drop(session);
    host.end();
    assert!(new.find_in_files(&place.store.root()).is_empty());
}

/// The kernel has no `memfd_secret` for this command and what it starts.
fn without_memfd_secret(command: &mut Command) {
    let forbidden = [(nix::libc::SYS_memfd_secret, Vec::new())].into_iter().collect();
    let refuse = SeccompAction::Errno(nix::libc::ENOSYS as u32);
    let arch = std::env::consts::ARCH.try_into().expect("an architecture with a filter");
    let filter = SeccompFilter::new(forbidden, SeccompAction::Allow, refuse, arch).expect("a filter");
    let program: BpfProgram = filter.try_into().expect("a filter");
    // SAFETY: between fork and exec the closure makes two system calls, with memory that it owns.
    unsafe {
        command.pre_exec(move || seccompiler::apply_filter(&program).map_err(std::io::Error::other));
    }
}

/// Its schedules hold a data key's pieces, but from the moment that they are made nothing has it in one
/// piece. Where memory for keys is what root can read, that can be seen; the rest is the same.
#[test]
fn the_data_key_goes_as_soon_as_its_schedules_are_made() {
    let mut secret = Vec::new();
    for there_is_memfd_secret in [true, false] {
        let place = Place::new(&[]);
        let run = |mut command: Command| {
            if !there_is_memfd_secret {
                without_memfd_secret(&mut command);
            }
            command
        };
        let old = place.dek();
        let host = place.start(run(place.attach_command(&["--hydrate-rate", "1"])), vec![]);
        let look = |dek: &[u8], when: &str| {
            use_disk(&mut open(&place.socket()));
            let seen = host.frozen(|| look_through(host.pid(), &Needles::of_raw_key(dek)));
            assert!(seen.found.is_empty() && seen.in_secret.is_empty(), "{when}: {:?}", seen.in_secret);
            assert_eq!(seen.unreadable, if there_is_memfd_secret { seen.secret } else { 0 }, "{when}");
            let control = host.frozen(|| look_through(host.pid(), &Needles::of_key(dek))).in_secret;
            assert_eq!(control.is_empty(), there_is_memfd_secret, "{when}: the schedules are there");
            let maps = fs::read_to_string(host.proc("maps")).expect("read the mappings");
            assert!(!maps.contains("memfd:sealblk-key"), "{when}: {maps}");
            seen.secret
        };
        secret.push(look(&old, "attached"));
        let mut rekey = place.store.command();
        rekey.args(["volume", "rekey", "t"]);
        assert!(run(rekey).status().expect("start sealblk").success());
        let metadata = place.metadata();
        let top = &metadata.keys()[metadata.top().key.expect("it is encrypted")].first().wrapped;
        let new = place.kms().decrypt(top, &metadata.encryption_context()).expect("unwrap the data key");
        assert!(old != new, "it has another data key");
        secret.extend([look(&old, "the old key"), look(&new, "the new key")]);
        host.end();
    }
    assert_eq!(secret[..3], secret[3..], "as much memory for keys, whichever it is");
}

/// At its end the process is held, with all its memory still there: the key has been wiped by then, and the
/// memory that was made for it has been given back.
#[test]
fn after_the_detach_the_key_is_in_no_memory_at_all() {
    let place = Place::new(&[]);
    let needles = Needles::of_key(&place.dek());
    let mut host = place.attach(&["--serial", SERIAL]);
    let mut session = open(&place.socket());
    use_disk(&mut session);
    assert!(host.frozen(|| look_through(host.pid(), &needles).secret) > 0);
    let traced = Traced::until_its_end(host.pid());
    let mut detach = place.store.command().args(["detach", "t"]).spawn().expect("start sealblk");
    traced.wait_for_its_end();
    assert!(wait_within(&mut detach, limit()).expect("it ends").success());
    let seen = look_through(host.pid(), &needles);
    assert!(seen.found.is_empty(), "{:#?}", seen.found);
    assert_eq!(seen.secret, 0, "the memory that was made for keys is still there");
    assert!(seen.bytes > 10 << 20, "only {} bytes were looked through", seen.bytes);
    drop(traced);
    assert!(host.wait().success());
}

#[test]
fn a_search_for_a_key_that_is_there_finds_it() {
    // This process has the key, in ordinary memory, in several spellings.
    let place = Place::new(&[]);
    let key = place.dek();
    let needles = Needles::of_key(&key);
    let spellings = [hex::encode(&*key), format!("{:?}", &key[..])];
    let hay = [&b"x"[..], &key, spellings[0].as_bytes(), spellings[1].as_bytes()].concat();
    for n in 0..4 {
        for how in ["as it is", "in hexadecimal", "in numbers"] {
            let what = format!("piece {n} of the data key, {how}");
            assert!(needles.find(&hay).iter().any(|(found, _)| *found == what), "{what}");
        }
    }
    let file = place.folder().join("leak");
    for shift in 0..3 {
        use base64::Engine;
        fs::write(&file, base64::engine::general_purpose::STANDARD.encode(&hay[1 + shift..65])).unwrap();
        assert!(needles.find_in_files(&place.folder()).len() >= 4, "base64, {shift} bytes on");
    }
}

/// The program with this place's folders, told to say all that it can, its temporary files within reach.
fn talkative_attach(place: &Place) -> Command {
    let mut command = place.attach_command(&["-vvv", "--serial", SERIAL]);
    let temporary = place.folder().join("tmp");
    fs::create_dir_all(&temporary).expect("make a folder");
    command.env_remove("RUST_LOG").env("TMPDIR", temporary);
    command
}

#[test]
fn the_key_is_in_no_file_log_argument_or_environment() {
    let place = Place::new(&[]);
    let needles = Needles::of_key(&place.dek());
    for _ in 0..2 {
        let host = place.start(talkative_attach(&place), vec![]);
        let mut session = open(&place.socket());
        use_disk(&mut session);
        assert!(host.output().contains("DEBUG"), "it does not say all that it can: {}", host.output());
        for name in ["cmdline", "environ", "status", "maps", "comm"] {
            let bytes = fs::read(host.proc(name)).expect("read a file of /proc");
            assert!(!bytes.is_empty(), "{name}");
            assert_eq!(needles.find(&bytes), [], "{name}");
        }
        // Layers, metadata, the KMS's store, its root key, logs: everything.
        assert_eq!(needles.find_in_files(&place.folder()), [""; 0]);
        host.end();
        assert_eq!(needles.find_in_files(&place.folder()), [""; 0]);
    }
    let events = place.store.ok(&["events", "--json", "-vvv"]);
    let shown = place.store.ok(&["volume", "show", "t", "--json", "-vvv"]);
    assert_eq!(needles.find((events + &shown).as_bytes()), []);
}

/// A refusal must not tell more than that it is one.
#[test]
fn a_refused_attach_says_nothing_of_the_key() {
    let place = Place::new(&[]);
    let needles = Needles::of_key(&place.dek());
    place.start(talkative_attach(&place), vec![]).end();
    let path = place.volume_json();
    let text = fs::read_to_string(&path).unwrap().replace("\"sector_size\": 512", "\"sector_size\": 4096");
    fs::write(&path, text).unwrap();
    place.store.accept();
    let said = place.run(talkative_attach(&place), vec![]);
    assert_eq!(said.code, 7, "{}", said.err);
    assert_eq!(needles.find(said.err.as_bytes()), []);
    assert_eq!(needles.find_in_files(&place.folder()), [""; 0]);
}

#[test]
fn the_helper_is_gone_when_a_vmm_can_connect() {
    let place = Place::new(&[]);
    for _ in 0..5 {
        let host = place.attach(&[]);
        assert_eq!(children(host.pid()), [] as [Pid; 0]);
        // Nor is what came from it kept as a descriptor: the memory is mapped, and that is all.
        for fd in fs::read_dir(host.proc("fd")).expect("list the descriptors") {
            let to = fs::read_link(fd.expect("list the descriptors").path()).unwrap_or_default();
            let to = to.display().to_string();
            assert!(!to.contains("secretmem") && !to.contains("memfd"), "{to}");
        }
        host.end();
    }
}

#[test]
fn the_keeper_of_the_grants_has_no_key() {
    let place = Place::with_settings("grantee-principal = 'arn:aws:iam::000000000000:root'", &[]);
    let needles = Needles::of_key(&place.dek());
    let host = place.attach(&[]);
    use_disk(&mut open(&place.socket()));
    let keepers = children(host.pid());
    assert_eq!(keepers.len(), 1);
    let traced = Traced::seize(keepers[0], 0);
    traced.interrupt();
    let seen = look_through(keepers[0], &needles);
    assert!(seen.found.is_empty(), "{:#?}", seen.found);
    assert!(seen.secret == 0 && seen.bytes > 1 << 20, "{} bytes", seen.bytes);
    drop(traced);
    host.end();
}

/// What is handed to the helper must be memory for keys, or else it keeps the key to itself.
#[test]
fn the_helper_puts_the_key_into_no_file() {
    let place = Place::new(&[]);
    let metadata = place.metadata();
    let wrapped = &metadata.keys()[0].first().wrapped;
    let request = serde_json::json!({
        "owner": {"volume": metadata.id()},
        "wrapped": {"provider": "embedded", "key_id": wrapped.key_id, "wrapped": BASE64_STANDARD.encode(&wrapped.blob)},
    });
    let path = place.folder().join("trap");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    file.set_len(64).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = place.store.command();
    command.arg("unwrap").stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
    let mut helper = command.spawn().expect("start the helper");
    drop(command);
    let fds = [file.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&fds)];
    let text = request.to_string();
    sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(text.as_bytes())], &control, MsgFlags::empty(), None)
        .unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    (&ours).read_to_string(&mut answer).unwrap();
    wait_within(&mut helper, limit()).expect("it ends");
    assert!(answer.contains("is not a sealed memory file for a key"), "{answer}");
    assert_eq!(fs::read(&path).unwrap(), [0; 64]);
    assert_eq!(Needles::of_key(&place.dek()).find(answer.as_bytes()), []);
}

/// The AWS SDK has had the key in buffers that are not ours. At its end the helper is held, with
/// all its memory still there.
#[test]
#[cfg_attr(
    not(all(feature = "aws", feature = "kms-server")),
    ignore = "it needs the features aws and kms-server"
)]
fn the_helper_that_asked_by_the_aws_sdk_has_nothing_of_the_key_at_its_end() {
    helper_keeps_nothing(&KmsServer::start(), "");
    let files = tempfile::tempdir().expect("make a temporary folder");
    let kms = KmsServer::start_tls(files.path());
    helper_keeps_nothing(&kms, &files.path().join("kms.pem").display().to_string());
}

fn helper_keeps_nothing(kms: &KmsServer, certificates: &str) {
    let store = Store::new();
    let mut environment = kms.principal("root").environment(&kms.url);
    set(&mut environment, "AWS_CA_BUNDLE", certificates);
    store.set_environment(environment);
    let key = kms.admin().create_key("", None).expect("make a key").arn;
    let place = Place::of(store, &["--key", &format!("aws:{key}")]);
    let metadata = place.metadata();
    let wrapped = &metadata.keys()[0].first().wrapped;
    let dek = kms.admin().decrypt(wrapped, &metadata.encryption_context()).expect("unwrap the data key");
    let request = serde_json::json!({
        "owner": {"volume": metadata.id()},
        "wrapped": {"provider": "aws", "key_id": wrapped.key_id, "wrapped": BASE64_STANDARD.encode(&wrapped.blob)},
    });
    let secret = SecretFd::create(64).expect("memory for a key");
    let answer = has_nothing_at_its_end(&place, "unwrap", &request, Some(&secret), &dek);
    assert_eq!(answer, "\"unwrapped\"\n");
    assert!(secret.map().expect("map it").as_slice() == &dek[..], "and yet it has handed the key over");
}

/// Asks a helper, and looks through its memory when it is at its end: nothing of the data key is
/// there. Returns its answer.
fn has_nothing_at_its_end(
    place: &Place,
    helper: &str,
    request: &serde_json::Value,
    secret: Option<&SecretFd>,
    dek: &[u8],
) -> String {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = place.store.command();
    command.arg(helper).stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
    let mut helper = command.spawn().expect("start the helper");
    drop(command);
    let pid = Pid::from_raw(helper.id() as i32);
    let traced = Traced::until_its_end(pid);
    let text = format!("{request}\n");
    let fds: Vec<_> = secret.iter().map(|secret| secret.as_fd().as_raw_fd()).collect();
    let control = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &control[..] };
    sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(text.as_bytes())], control, MsgFlags::empty(), None)
        .unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    traced.wait_for_its_end();
    let seen = look_through(pid, &Needles::of_key(dek));
    assert!(seen.found.is_empty(), "{:#?}", seen.found);
    let root = place.store.root().display().to_string();
    assert!(
        !look_through(pid, &Needles::words(&root)).found.is_empty(),
        "the search does not find its arguments"
    );
    drop(traced);
    let mut answer = String::new();
    (&ours).read_to_string(&mut answer).unwrap();
    assert!(wait_within(&mut helper, limit()).expect("it ends").success());
    answer
}

/// From one KMS to another a data key passes the helper that wraps it anew, which proves what it has made.
#[test]
#[cfg_attr(
    not(all(feature = "aws", feature = "kms-server")),
    ignore = "it needs the features aws and kms-server"
)]
fn the_helper_that_wraps_anew_has_nothing_of_the_key_at_its_end() {
    let kms = KmsServer::start();
    let store = Store::new();
    store.set_environment(kms.principal("root").environment(&kms.url));
    let served = kms.admin().create_key("", None).expect("make a key").arn;
    let place = Place::of(store, &["--key", &format!("aws:{served}")]);
    place.store.ok(&["key", "create", "--alias", "own"]);
    let metadata = place.metadata();
    let wrapped = &metadata.keys()[0].first().wrapped;
    let dek = kms.admin().decrypt(wrapped, &metadata.encryption_context()).expect("unwrap the data key");
    let blob = BASE64_STANDARD.encode(&wrapped.blob);
    let mut slot = serde_json::json!({"provider": "aws", "key_id": wrapped.key_id, "wrapped": blob});
    // To the embedded KMS, from there to AWS's protocol, and within each.
    let targets =
        [("embedded", "alias/own"), ("embedded", "alias/own"), ("aws", &*served), ("aws", &*served)];
    for (provider, key) in targets {
        let request = serde_json::json!({
            "owner": {"volume": metadata.id()}, "to_owner": null, "old": slot, "check": null,
            "to": {"provider": provider, "key": key}, "patience_ms": 10_000,
        });
        let answer = has_nothing_at_its_end(&place, "rewrap-key", &request, None, &dek);
        let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
        slot = answer["proved"].clone();
        assert_eq!(slot["provider"], provider, "{answer}");
        assert_eq!(Needles::of_key(&dek).find(answer.to_string().as_bytes()), []);
    }
}

/// A data key, and the PIN, that pass an HSM's module: while it lives nothing of the data key is in the
/// memory of its process or in that of the KMS, and of the PIN nothing is in the latter.
#[test]
#[cfg_attr(
    not(all(feature = "aws", feature = "kms-server", feature = "pkcs11")),
    ignore = "it needs the features aws, kms-server and pkcs11"
)]
fn the_process_that_has_an_hsm_s_module_keeps_no_data_key() {
    let hsm = SoftHsm::with_tokens(&["one"]);
    let variables = hsm.environment();
    let kms = KmsServer::start_prepared("", |command| {
        command.envs(variables);
    });
    let of_kms = |arguments: &[&str]| {
        let mut command = kms.command();
        give_pin(command.args(arguments).envs(hsm.environment()), &SoftHsm::pin("one"));
        let output = command.output().expect("start sealblk");
        assert!(output.status.success(), "{}", said(&output));
        output.stdout
    };
    let module = SoftHsm::module().display().to_string();
    of_kms(&["kms", "store", "add", "--pkcs11", &module, "--token", "one", "--keep-pin"]);
    let made = of_kms(&["--json", "key", "create", "--key-store", "one"]);
    let made: serde_json::Value = serde_json::from_slice(&made).expect("JSON");
    let key = made["arn"].as_str().expect("a text");
    let (store, who) = (Store::new(), kms.principal("root"));
    store.set_environment(who.environment(&kms.url));
    let place = Place::of(store, &["--key", &format!("aws:{key}")]);
    let host = place.attach(&[]);
    place.store.ok(&["volume", "rewrap", "t"]);
    let dek = unwrapped_by_helper(&place);
    host.end();
    let module = children(kms.pid()).pop().expect("it has the module");
    for pid in [module, kms.pid()] {
        signal::kill(pid, Signal::SIGSTOP).expect("it runs");
        let seen = look_through(pid, &Needles::of_key(&dek));
        let pin = look_through(pid, &Needles::words(&SoftHsm::pin("one")));
        signal::kill(pid, Signal::SIGCONT).expect("it runs");
        assert!(seen.found.is_empty() && seen.bytes > 1 << 20, "{:#?}", seen.found);
        assert!(pid == module || pin.found.is_empty(), "{:#?}", pin.found);
    }
}

/// The data key of the volume, as its helper hands it over.
fn unwrapped_by_helper(place: &Place) -> Vec<u8> {
    let metadata = place.metadata();
    let wrapped = &metadata.keys()[0].first().wrapped;
    let request = serde_json::json!({
        "owner": {"volume": metadata.id()},
        "wrapped": {"provider": "aws", "key_id": wrapped.key_id, "wrapped": BASE64_STANDARD.encode(&wrapped.blob)},
    });
    let secret = SecretFd::create(64).expect("memory for a key");
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = place.store.command();
    command.arg("unwrap").stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
    let mut helper = command.spawn().expect("start the helper");
    drop(command);
    let (text, fds) = (request.to_string(), [secret.as_fd().as_raw_fd()]);
    let control = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(text.as_bytes())], &control, MsgFlags::empty(), None)
        .unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    assert!(wait_within(&mut helper, limit()).expect("it ends").success());
    secret.map().expect("map it").as_slice().to_vec()
}

#[test]
fn the_helper_is_of_no_use_by_hand() {
    let place = Place::new(&[]);
    let output = place.store.run(&["unwrap"]);
    assert!(!output.status.success() && output.stdout.is_empty(), "{}", said(&output));
}

/// What the process starts with is as generous as can be; what it makes of that counts.
fn let_it_dump(command: &mut Command) {
    // SAFETY: between fork and exec the closure makes one system call without pointers to what could go away.
    unsafe {
        command.pre_exec(|| {
            setrlimit(Resource::RLIMIT_CORE, RLIM_INFINITY, RLIM_INFINITY).map_err(std::io::Error::from)
        });
    }
}

/// The limits on core files of a process: the soft one and the hard one.
fn core_limits(pid: Pid) -> Vec<String> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("read the limits");
    let core = limits.lines().find(|l| l.starts_with("Max core file size"));
    core.expect("there is such a limit").split_whitespace().skip(4).take(2).map(str::to_owned).collect()
}

#[test]
fn a_crash_leaves_no_core() {
    for signal in [Signal::SIGQUIT, Signal::SIGABRT] {
        let place = Place::new(&[]);
        let needles = Needles::of_key(&place.dek());
        let mut command = place.attach_command(&[]);
        command.current_dir(place.folder());
        let_it_dump(&mut command);
        let mut host = place.start(command, vec![]);
        assert_eq!(core_limits(host.pid()), ["0", "0"]);
        host.signal(signal);
        let status = host.wait();
        assert_eq!((status.signal(), status.core_dumped()), (Some(signal as i32), false));
        assert_eq!(needles.find_in_files(&place.folder()), [""; 0]);
    }
}

/// What a KMS's store is opened with and what it holds: its root key, what that derives, and
/// the material of its keys.
fn secrets_of(kms: &KmsServer) -> Vec<(String, [u8; 32])> {
    let root_key = kms.root_key();
    let log = fs::read(kms.folders().0.join("kms/log")).expect("read the store");
    let header = Header::parse(&log).expect("a header");
    let hkdf = hkdf::Hkdf::<sha2::Sha256>::new(Some(header.store.as_bytes()), &root_key);
    let mut secrets = vec![("the root key".to_owned(), root_key)];
    for name in ["store key", "log mac key", "audit key"] {
        let mut key = [0; 32];
        hkdf.expand(format!("sealblk kms {name}").as_bytes(), &mut key).expect("one block");
        secrets.push((format!("the {name}"), key));
    }
    let root_key = RootKey::copy_of(&root_key);
    let keys = LogKeys::derive(&root_key.expect("memory"), header.store).expect("memory");
    let (mut rest, mut place) = (&log[HEADER_LEN..], header.base);
    while let Next::Record { body, after, len } =
        next_record(&place, rest, (log.len() - rest.len()) as u64, &keys).expect("a good log")
    {
        let changes = Transaction::decode(after.seq, body).expect("a transaction").changes;
        for change in changes {
            let sealed: Vec<_> = match &change {
                Change::Key(key) => key.versions.iter().map(|v| (key.id, v.id, v.sealed)).collect(),
                Change::Principal(who) => vec![(who.id, who.id, who.sealed)],
                _ => Vec::new(),
            };
            for (key, version, sealed) in sealed {
                let material = keys.open(key, version, &sealed).expect("its material");
                secrets.push((format!("material of {key}"), *material.bytes()));
            }
        }
        (rest, place) = (&rest[len..], after);
    }
    assert!(secrets.len() > 5, "there are a key and a principal");
    secrets
}

const PASSPHRASE: &str = "a needle that no haystack here has";

/// Needles of all that, and of the passphrase that the root key may be under.
fn kms_needles(kms: &KmsServer) -> Needles {
    let secrets = secrets_of(kms);
    let mut all: Vec<(&str, &[u8])> = secrets.iter().map(|(name, key)| (&**name, &key[..])).collect();
    all.push(("the passphrase", &PASSPHRASE.as_bytes()[..32]));
    Needles::of_secrets(&all)
}

/// The keys of a KMS that is served are nowhere but in the memory that is made for them,
/// whatever it has been asked for.
#[test]
#[cfg_attr(
    not(all(feature = "aws", feature = "kms-server")),
    ignore = "it needs the features aws and kms-server"
)]
fn a_served_kms_has_its_keys_in_no_memory_but_theirs() {
    for kms in [KmsServer::start(), KmsServer::start_under(PASSPHRASE)] {
        let (store, who, key) = (Store::new(), kms.principal("root"), kms.create_key());
        store.set_environment(who.environment(&kms.url));
        let place = Place::of(store, &["--key", &format!("aws:{key}")]);
        let host = place.attach(&[]);
        place.store.ok(&["volume", "rewrap", "t"]);
        host.end();
        let needles = kms_needles(&kms);
        signal::kill(kms.pid(), Signal::SIGSTOP).expect("it runs");
        let seen = look_through(kms.pid(), &needles);
        let control = look_through(kms.pid(), &Needles::words(who.keys().0));
        signal::kill(kms.pid(), Signal::SIGCONT).expect("it runs");
        assert!(seen.found.is_empty(), "{:#?}", seen.found);
        assert!(seen.secret > 0 && seen.bytes > 1 << 20, "{} bytes", seen.bytes);
        assert!(!control.found.is_empty(), "the search does not find the access key either");
        assert_eq!(core_limits(kms.pid()), ["0", "0"]);
    }
}

/// Returns when everything that was written into a pipe has been read.
fn until_read(pipe: &File) {
    wait_for("what was written into the pipe is read", || {
        let mut left: nix::libc::c_int = 0;
        // SAFETY: the request writes one int, which is there.
        let done = unsafe { nix::libc::ioctl(pipe.as_raw_fd(), nix::libc::FIONREAD, &mut left) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        if left == 0 { Ok(()) } else { Err(format!("{left} bytes in it")) }
    });
}

/// `kms passphrase set` of a store that is under a passphrase: the command, and the pipe that
/// it reads the new one from.
fn passphrase_set(kms: &KmsServer) -> (Command, File) {
    let (mut command, number) = (kms.command(), INHERITED + 1);
    command.args(["kms", "passphrase", "set", "--new-passphrase-fd", &number.to_string()]);
    let (reader, new) = std::io::pipe().expect("make a pipe");
    inherit(&mut command, reader.into(), number);
    command.current_dir(kms.folders().0).stdout(Stdio::null());
    let_it_dump(&mut command);
    tie_to_test(&mut command, vec![]);
    (command, OwnedFd::from(new).into())
}

#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "it needs the feature kms-server")]
fn whoever_sets_a_passphrase_leaves_no_core() {
    for signal in [Signal::SIGQUIT, Signal::SIGABRT] {
        let kms = KmsServer::start_under(PASSPHRASE);
        let (mut command, mut new) = passphrase_set(&kms);
        let mut child = command.spawn().expect("start sealblk");
        drop(command);
        // It has opened the store with the old one when it reads the new one.
        new.write_all(b"the beginning of").expect("it fits into a pipe");
        until_read(&new);
        let pid = Pid::from_raw(child.id() as i32);
        assert_eq!(core_limits(pid), ["0", "0"]);
        signal::kill(pid, signal).expect("it runs");
        let status = wait_within(&mut child, limit()).expect("it ends");
        assert_eq!((status.signal(), status.core_dumped()), (Some(signal as i32), false));
    }
}

/// At its end the command is held, with all its memory still there.
#[test]
#[cfg_attr(not(feature = "kms-server"), ignore = "it needs the feature kms-server")]
fn whoever_sets_a_passphrase_has_no_key_in_memory_but_its_own_and_none_at_its_end() {
    let kms = KmsServer::start_under(PASSPHRASE);
    let _ = (kms.principal("root"), kms.create_key());
    let (mut command, mut new) = passphrase_set(&kms);
    let mut child = command.spawn().expect("start sealblk");
    drop(command);
    new.write_all(b"another ").expect("it fits into a pipe");
    until_read(&new);
    let pid = Pid::from_raw(child.id() as i32);
    let traced = Traced::until_its_end(pid);
    traced.interrupt();
    let needles = kms_needles(&kms);
    let seen = look_through(pid, &needles);
    assert!(seen.found.is_empty(), "{:#?}", seen.found);
    assert!(seen.secret > 0, "where are the keys?");
    traced.go_on();
    new.write_all(b"passphrase\n").expect("it fits into a pipe");
    traced.wait_for_its_end();
    let seen = look_through(pid, &needles);
    assert!(seen.found.is_empty(), "{:#?}", seen.found);
    drop(traced);
    assert!(wait_within(&mut child, limit()).expect("it ends").success());
}

/// The kernel gives the files of a process that must not be dumped to root, whosever the process is; that is
/// what keeps its owner's other programs from tracing it and from reading its memory.
#[test]
fn an_ordinary_users_programs_cannot_look_into_his_host_process() {
    const NOBODY: u32 = 65534;
    let place = Place::new(&[]);
    let folder = place.folder();
    let program = folder.join("sealblk");
    // By another process: a child that another test starts meanwhile would inherit our descriptor, and a file
    // that somebody has open for writing cannot be executed.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_sealblk")).arg(&program).status();
    assert!(copied.expect("start cp").success(), "copy the program to where he can read it");
    give(&folder, NOBODY);
    let his = |program: &Path| {
        let mut command = Command::new(program);
        command.env("SEALBLK_CONFIG_DIR", place.store.config()).env("SEALBLK_ROOT", place.store.root());
        command.stdin(Stdio::null()).current_dir(&folder).uid(NOBODY).gid(NOBODY);
        command
    };
    let mut command = his(&program);
    command.args(["attach", "t", "--socket-path"]).arg(place.socket());
    let host = place.start(command, vec![]);
    use_disk(&mut open(&place.socket()));
    let status = fs::read_to_string(host.proc("status")).expect("read the status");
    assert!(status.lines().any(|l| l.starts_with("Uid:") && l.contains("65534")), "{status}");
    assert!(status.lines().any(|l| l == "NoNewPrivs:\t1"), "{status}");
    assert_eq!(fs::metadata(host.proc("environ")).unwrap().uid(), 0);
    let cat = |path: &Path| his(Path::new("cat")).arg(path).output().expect("start cat").status;
    assert!(!cat(&host.proc("environ")).success());
    assert!(cat(&host.proc("status")).success(), "what is for everybody he may read");

    // One more look in the same way, at a process of his that has nothing to hide.
    let mut sleeper = his(Path::new("sleep")).arg("600").stdout(Stdio::null()).spawn().expect("start it");
    let open_book = Path::new("/proc").join(sleeper.id().to_string()).join("environ");
    let (owner, readable) = (fs::metadata(&open_book).map(|m| m.uid()), cat(&open_book).success());
    sleeper.kill().and_then(|()| sleeper.wait()).expect("end it");
    assert_eq!((owner.expect("it runs"), readable), (NOBODY, true));
    host.end();
}

/// Makes `folder` and all below it the user's.
fn give(folder: &Path, user: u32) {
    chown(folder, Some(user), Some(user)).expect("root may give files away");
    for entry in fs::read_dir(folder).expect("list a folder") {
        let path = entry.expect("list a folder").path();
        match path.is_dir() {
            true => give(&path, user),
            false => chown(&path, Some(user), Some(user)).expect("root may give files away"),
        }
    }
}
