use super::*;
use std::os::unix::fs::symlink;
use std::time::Duration;

fn place() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().canonicalize().unwrap();
    (dir, top)
}

#[test]
fn no_part_of_a_path_is_a_link() {
    let (_dir, top) = place();
    std::fs::create_dir(top.join("real")).unwrap();
    std::fs::write(top.join("real/file"), "x").unwrap();
    symlink("real", top.join("link")).unwrap();
    symlink("real/file", top.join("name")).unwrap();
    assert_eq!(read(&top.join("real/file"), 1).unwrap(), b"x");
    for path in ["link/file", "name"].map(|path| top.join(path)) {
        let e = open(&path).unwrap_err();
        assert_eq!(crate::base::Error::from(e).kind(), crate::base::Kind::Corrupt, "{}", path.display());
    }
    assert!(folder(&top.join("link")).is_err() && names(&top.join("link")).is_err());
    assert!(
        remove(&top.join("link/file")).is_err() && rename(&top.join("link/file"), &top.join("x")).is_err()
    );
    assert!(
        set_mode(&top.join("name"), 0o777).is_err() && create_dir_durable(&top.join("link/new")).is_err()
    );
    assert!(remove_folder(&top.join("link")).is_err() && top.join("real/file").exists());
    assert!(replace_file(&top.join("link/file"), b"y").is_err());
    // A link that has the name is what is replaced or removed, and not what it leads to.
    replace_file(&top.join("name"), b"z").unwrap();
    assert_eq!(
        (read(&top.join("name"), 1).unwrap(), read(&top.join("real/file"), 1).unwrap()),
        (b"z".into(), b"x".into())
    );
    symlink("real/file", top.join("again")).unwrap();
    remove(&top.join("again")).unwrap();
    assert!(top.join("real/file").exists());
}

#[test]
fn the_last_part_is_guarded_where_the_kernel_lacks_the_call() {
    let (_dir, top) = place();
    std::fs::write(top.join("file"), "x").unwrap();
    symlink("file", top.join("link")).unwrap();
    // A thread of its own, to which the kernel says that it has no such call.
    std::thread::spawn(move || {
        use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
        let arch = TargetArch::try_from(std::env::consts::ARCH).unwrap();
        let none = SeccompAction::Errno(nix::libc::ENOSYS as u32);
        let openat2 = [(nix::libc::SYS_openat2, vec![])].into();
        let filter = SeccompFilter::new(openat2, SeccompAction::Allow, none, arch).unwrap();
        seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
        let call = nix::fcntl::openat2(AT_FDCWD, &top.join("file"), OpenHow::new());
        assert_eq!(call.unwrap_err(), Errno::ENOSYS);
        assert_eq!(read(&top.join("file"), 1).unwrap(), b"x");
        let refused = open(&top.join("link")).unwrap_err();
        assert_eq!(crate::base::Error::from(refused).kind(), crate::base::Kind::Corrupt);
    })
    .join()
    .unwrap();
}

#[test]
fn what_is_opened_is_what_was_asked_for() {
    let (_dir, top) = place();
    nix::unistd::mkfifo(&top.join("pipe"), Mode::S_IRWXU).unwrap();
    std::os::unix::net::UnixListener::bind(top.join("socket")).unwrap();
    std::fs::create_dir(top.join("folder")).unwrap();
    for name in ["pipe", "socket", "folder"] {
        for flags in [OFlag::O_RDONLY, OFlag::O_WRONLY, OFlag::O_RDWR] {
            assert!(open_with(&top.join(name), flags).is_err(), "{name}");
            assert!(open_layer(&top.join(name), flags).is_err(), "{name}");
        }
    }
    std::fs::write(top.join("file"), "four").unwrap();
    let file = open_with(&top.join("file"), OFlag::O_RDWR | OFlag::O_APPEND).unwrap();
    let flags = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_GETFL).unwrap();
    let flags = OFlag::from_bits_retain(flags);
    assert!(flags.contains(OFlag::O_APPEND) && !flags.contains(OFlag::O_NONBLOCK));
    assert!(read(&top.join("file"), 3).is_err() && read(&top.join("file"), 4).is_ok());
}

#[test]
fn a_file_that_is_there_is_not_created_again() {
    let (_dir, top) = place();
    let path = top.join("record");
    create_file(&path, b"first").unwrap();
    let e = create_file(&path, b"second").unwrap_err();
    assert!(e.to_string().contains("exists"), "{e}");
    assert_eq!(read(&path, 100).unwrap(), b"first");
    assert_eq!(names(&top).unwrap(), ["record"], "no temporary file is left");
}

#[test]
fn a_name_is_given_and_taken_for_the_file_that_is_open_alone() {
    let (_dir, top) = place();
    let (a, b, c) = (top.join("a"), top.join("b"), top.join("c"));
    std::fs::write(&a, "a").unwrap();
    std::fs::write(&b, "b").unwrap();
    let file = open(&a).unwrap();
    assert!(link(&file, &b, &c).is_err() && !c.exists(), "it is another file's name");
    link(&file, &a, &c).unwrap();
    assert!(is_at(&file, &c).unwrap());
    assert!(link(&file, &a, &b).is_err(), "the name is in use");
    assert!(remove_name_of(&file, &b).is_err() && b.exists());
    remove_name_of(&file, &c).unwrap();
    assert!(a.exists() && !c.exists());
}

#[test]
fn a_socket_is_connected_to_by_its_own_name() {
    let (_dir, top) = place();
    let long = top.join("long".repeat(30));
    create_dir_durable(&long).unwrap();
    let _listener = inside(&long, || Ok(std::os::unix::net::UnixListener::bind("s")?)).unwrap();
    let connect = |path: &Path| super::connect(path, Duration::from_millis(50));
    connect(&long.join("s")).unwrap();
    symlink(long.join("s"), top.join("link")).unwrap();
    assert!(connect(&top.join("link")).is_err());
    // Nobody takes them in: there is an end to how many may wait.
    let mut waiting = Vec::new();
    let refused = loop {
        match connect(&long.join("s")) {
            Ok(client) => waiting.push(client),
            Err(e) => break e,
        }
    };
    assert_eq!(refused.kind(), ErrorKind::TimedOut);
}
