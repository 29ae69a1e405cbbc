//! Who gets a new data key: the process that has the volume's present one, and nobody who only
//! listens where it should.

use crate::common::attach::Place;
use crate::impostor::Impostor;
use crate::{refused, run};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use sealblk::catalog::rekey::passed_for;
use sealblk::catalog::slots::KeySlot;
use sealblk::crypt::{Dek, SecretFd};
use sealblk::kms::{EncryptionContext, KeyProvider, WrappedKey};
use serde_json::Value;
use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};

/// Everything that is said to a host process.
fn all_that_talks(place: &Place, words: &str) {
    let id = place.id();
    for command in [
        &["volume", "rekey", &id][..],
        &["volume", "flatten", &id],
        &["volume", "resize", &id, "16MiB"],
        &["volume", "rewrap", &id, "--key", "alias/aws/ebs"],
        &["snapshot", "create", &id],
        &["throttle", &id, "--iops", "100"],
        &["detach", &id],
    ] {
        let (code, said) = run(place, command);
        assert!(code != 0 && said.contains(words), "{command:?}: {code}: {said}");
    }
}

#[test]
fn a_socket_in_the_volumes_folder_is_not_its_host_process() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let (socket, aside) =
        (place.volume_folder().join("control.sock"), place.volume_folder().join("aside.sock"));
    fs::rename(&socket, &aside).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    listener.set_nonblocking(true).unwrap();
    all_that_talks(&place, "does not have the volume");
    // Nobody has said a word.
    while let Ok((mut client, _)) = listener.accept() {
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).unwrap();
        assert!(heard.is_empty(), "{}", String::from_utf8_lossy(&heard));
    }
    fs::remove_file(&socket).unwrap();
    // Nor is one volume's host process talked to in place of another's.
    place.store.ok(&["volume", "create", "--size", "8MiB", "--name", "other"]);
    symlink(&aside, &socket).unwrap();
    all_that_talks(&place, "symbolic link");
    fs::remove_file(&socket).unwrap();
    fs::rename(&aside, &socket).unwrap();
    place.store.ok(&["volume", "rekey", &place.id()]);
    host.end();
}

#[test]
fn a_socket_of_another_user_is_not_a_host_process() {
    let place = Place::new(&[]);
    let impostor = Impostor::new(&place);
    let path = place.volume_folder().join("control.sock");
    fs::remove_file(&path).unwrap();
    let listener =
        socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    socket::bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    // The kernel notes who listens: a thread that is another user's by then. The lock is
    // this process's all the same.
    let listening = std::thread::spawn(move || {
        let nobody: nix::libc::uid_t = 65534;
        // SAFETY: the call changes the credentials of this thread alone, which ends right after.
        let changed = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, nobody, nobody, nobody) };
        assert_eq!(changed, 0);
        socket::listen(&listener, Backlog::new(8).unwrap()).unwrap();
        listener
    });
    let listener = listening.join().unwrap();
    all_that_talks(&place, "is not a user whose the store may be");
    place.store.let_belong_to("nobody");
    let (_, said) = {
        // Whose the store may be, may have its volumes: then it goes on, and nobody answers.
        let command = ["throttle", &place.id(), "--iops", "100"].map(str::to_owned);
        let closing = std::thread::spawn(move || {
            // Those that were refused before have said nothing.
            loop {
                let client = socket::accept(listener.as_raw_fd()).unwrap();
                // SAFETY: the kernel just made this descriptor; nobody else knows it.
                let mut client = UnixStream::from(unsafe { OwnedFd::from_raw_fd(client) });
                if client.read(&mut [0; 64]).unwrap() > 0 {
                    return;
                }
            }
        });
        let said = run(&place, &command.each_ref().map(String::as_str));
        closing.join().unwrap();
        said
    };
    assert!(said.contains("ended without a word"), "{said}");
    drop(impostor);
}

#[test]
fn whoever_has_the_lock_and_not_the_data_key_gets_no_new_one() {
    let place = Place::new(&[]);
    place.attach(&[]).end();
    let (present, id) = (Dek::from_bytes(&place.dek()).unwrap(), place.metadata().id());
    let (request, secret) = Impostor::new(&place).overhears(|| run(&place, &["volume", "rekey", "t"]));
    let request = request["rekey"].as_object().or(request.as_object()).expect("a request").clone();
    let key = &request["key"];
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let wrapped = WrappedKey { key_id: text(&key["key_id"]), blob: base64(&text(&key["wrapped"])) };
    let context = EncryptionContext::pair("aws:ebs:id", id.to_string());
    let new = place.kms().decrypt(&wrapped, &context).unwrap();
    let memory = SecretFd::from_fd(secret).unwrap().map().unwrap();
    let found = memory.as_slice();
    assert_eq!(found.len(), Dek::PASSED_LEN);
    for part in new.windows(8) {
        assert!(!found.windows(8).any(|other| other == part), "a part of the new data key is there");
    }
    // With the present data key it would be read: so this is the key that was to be passed.
    let slots = [KeySlot::new("embedded", wrapped)];
    let context = passed_for(id, text(&request["layer"]).parse().unwrap(), &slots);
    assert!(present.pass_key().unwrap().take(found, &context).unwrap().expose()[..] == new[..]);
}

fn base64(text: &str) -> Vec<u8> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.decode(text).unwrap()
}

/// The key in `volume.json` was replaced: what it unwraps to is not what the volume was written with.
#[test]
fn a_new_key_is_not_passed_under_a_key_that_was_planted() {
    let place = Place::new(&[]);
    let host = place.attach(&[]);
    let (context, json) = (EncryptionContext::pair("aws:ebs:id", place.id()), place.volume_json());
    let planted = place.kms().generate_wrapped(&place.key(), 64, &context).unwrap();
    let whole = fs::read(&json).unwrap();
    crate::edit(&json, |volume| {
        use base64::Engine;
        volume["keys"][0]["wrapped"] = base64::engine::general_purpose::STANDARD.encode(&planted.blob).into();
    });
    place.store.accept();
    let id = place.id();
    refused(&place, &["volume", "rekey", &id], 7, "it was replaced");
    // Where the check value was replaced as well, the host process sees that it was not passed to it.
    let dek = place.kms().decrypt(&planted, &context).unwrap();
    let check = hex::encode(Dek::from_bytes(&dek).unwrap().check_value());
    crate::edit(&json, |volume| volume["keys"][0]["check"] = check.into());
    place.store.accept();
    refused(&place, &["volume", "rekey", &id], 7, "was not passed under the data key that the volume has");
    fs::write(&json, whole).unwrap();
    place.store.accept();
    place.store.ok(&["volume", "rekey", &id]);
    host.end();
}
