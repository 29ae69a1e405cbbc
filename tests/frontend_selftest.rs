//! The test front-end against a back-end that is not ours: qemu-storage-daemon.

mod common;

use common::frontend::*;
use std::path::Path;
use std::process::Command;

const SIZE: u64 = 64 << 20;

fn storage_daemon(dir: &Path, queues: usize) -> Server {
    let image = dir.join("disk.raw");
    std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
    let socket = dir.join("disk.sock");
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--blockdev").arg(format!("file,node-name=disk,filename={},discard=unmap", image.display()));
    command.arg("--export").arg(format!(
        "vhost-user-blk,id=e,node-name=disk,writable=on,num-queues={queues},addr.type=unix,addr.path={}",
        socket.display()
    ));
    Server::start(command, &socket).unwrap()
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed).wrapping_add((i >> 8) as u8)).collect()
}

fn framings() -> Vec<Framing> {
    vec![
        Framing::Classic,
        Framing::SplitHeader,
        Framing::HeaderWithData,
        Framing::DataWithStatus,
        Framing::Compact,
        Framing::Scattered(vec![511, 1, 1000, 37, 4096]),
        Framing::Cuts(vec![1, 2, 16, 17, 600], vec![1, 600]),
    ]
}

#[test]
fn every_framing_and_place_carries_data() {
    let dir = tempfile::tempdir().unwrap();
    let server = storage_daemon(dir.path(), 1);
    for (order, layout) in [
        (Order::Qemu7, Layout::flat(16 << 20)),
        (Order::Qemu10, Layout::pc(16 << 20)),
        (Order::CloudHypervisor, Layout::rings_apart(16 << 20)),
    ] {
        for event_idx in [0, session::F_EVENT_IDX] {
            let features = !(session::F_LOG_ALL | session::F_EVENT_IDX) | event_idx;
            let options = Options { order, layout: layout.clone(), features, ..Options::default() };
            let mut session = Session::open(server.socket(), &options).unwrap();
            let ring = &mut session.rings[0];
            for (n, framing) in framings().into_iter().enumerate() {
                for place in [Place::Direct, Place::Indirect] {
                    let data = pattern(n as u8 * 3, 8192);
                    let write = Request::write(16 * n as u64, &data).framed(framing.clone()).placed(place);
                    assert_eq!(write.run(ring).unwrap().status, block::OK, "{framing:?} {place:?}");
                    let read = Request::read(16 * n as u64, 8192).framed(framing.clone()).placed(place);
                    let got = read.run(ring).unwrap();
                    assert_eq!((got.status, got.used_len), (block::OK, 8193), "{framing:?} {place:?}");
                    assert_eq!(got.data, data);
                }
            }
            assert_eq!(Request::flush().run(ring).unwrap().status, block::OK);
        }
    }
}

#[test]
fn other_requests_config_and_restart() {
    let dir = tempfile::tempdir().unwrap();
    let server = storage_daemon(dir.path(), 2);
    let mut session = Session::open(server.socket(), &Options { queues: 2, ..Options::default() }).unwrap();
    println!("{:x} {:?} {:?}", session.offered, session.offered_protocol, session.config());
    assert_eq!(session.config().unwrap().capacity, SIZE / 512);
    for ring in &mut session.rings {
        println!("{:?}", Request::get_id(20).run(ring).unwrap());
        let one = Segment { sector: 0, count: 8, flags: 0 };
        assert_eq!(Request::discard(&[one]).run(ring).unwrap().status, block::OK);
        assert_eq!(Request::write_zeroes(&[one]).run(ring).unwrap().status, block::OK);
        assert_eq!(Request::new(77, 0, vec![], 0).run(ring).unwrap().status, block::UNSUPP);
        for _ in 0..1000 {
            let pending = Request::read(0, 512).submit(ring).unwrap();
            ring.kick_if_wanted();
            let used = ring.poll_used(LIMIT).unwrap();
            assert_eq!(pending.finish(ring, used).unwrap().status, block::OK);
        }
    }
    let bases = session.stop().unwrap();
    assert_eq!(bases, vec![session.rings[0].used_idx(), session.rings[1].used_idx()]);
    session.start_at(&bases).unwrap();
    assert_eq!(Request::flush().run(&mut session.rings[1]).unwrap().status, block::OK);
    println!("{:?} {}", server.holdings().unwrap(), server::cpu_ns(server.pid()).unwrap());
}

#[test]
fn raw_messages() {
    let dir = tempfile::tempdir().unwrap();
    let server = storage_daemon(dir.path(), 1);
    let raw = RawSocket::connect(server.socket()).unwrap();
    let reply = raw.ask(1, raw::VERSION, &[], &[]).unwrap();
    assert_eq!((reply.request, reply.flags & raw::REPLY), (1, raw::REPLY));
    assert_ne!(reply.value().unwrap(), 0);
}
