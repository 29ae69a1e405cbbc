//! A cluster that is slow, gone for a while, or full.

use super::cluster::{Cluster, rig, server_of};
use crate::common::frontend::block::{IOERR, OK};
use crate::common::frontend::{Request, Segment};
use crate::common::patience::wait_for;
use crate::nbd::server::content;
use nix::sys::signal::{Signal, kill};

const SIZE: usize = 8 << 20;

#[test]
fn an_osd_that_is_killed_and_comes_back_is_a_pause() {
    let cluster = Cluster::own();
    let rig = rig(&cluster, "osd", &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    for seed in [1, 100] {
        guest.writes_survive(seed, || {
            cluster.signal_osd(Signal::SIGKILL);
            cluster.start_osd();
        });
        guest.work();
    }
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn a_monitor_that_is_away_is_missed_by_those_alone_who_connect() {
    let cluster = Cluster::own();
    let rig = rig(&cluster, "monitor", &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    for seed in [1, 100] {
        cluster.kill_monitor();
        guest.work();
        // Who is to serve the image from now on has to ask the monitor where it is.
        guest.writes_survive(seed, || {
            kill(server_of(&host), Signal::SIGKILL).unwrap();
            cluster.start_monitor();
        });
        guest.work();
    }
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
}

#[test]
fn an_osd_that_stands_still_is_waited_for_so_long_and_no_longer() {
    let cluster = Cluster::own();
    let store = rig(&cluster, "still", &[]);
    let (host, mut guest) = store.attach("t", 512, vec![0; SIZE]);
    guest.work();
    // A moment is a pause.
    guest.writes_survive(1, || {
        cluster.signal_osd(Signal::SIGSTOP);
        cluster.signal_osd(Signal::SIGCONT);
    });
    let data = guest.leave();
    host.end();
    cluster.settle("[client]\nrados_osd_op_timeout = 3");
    let (host, mut guest) = store.attach("t", 512, data);
    guest.look();
    cluster.signal_osd(Signal::SIGSTOP);
    let ring = &mut guest.session.rings[0];
    assert_eq!(Request::write(0, &[1; 4096]).run(ring).unwrap().status, IOERR);
    assert_eq!(Request::read(0, 4096).run(ring).unwrap().status, IOERR);
    host.says("has not answered in time, and whether that is done is not known");
    cluster.signal_osd(Signal::SIGCONT);
    wait_for("it is served again", || match Request::write(0, &[2; 4096]).run(ring).unwrap().status {
        OK => Ok(()),
        status => Err(status),
    });
    guest.data[..4096].fill(2);
    guest.look();
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(content(&store, "volume", "t") == data);
}

#[test]
fn a_full_cluster_fails_writes_until_it_has_space() {
    let cluster = Cluster::own();
    let rig = rig(&cluster, "full", &[]);
    let (host, mut guest) = rig.attach("t", 512, vec![0; SIZE]);
    guest.work();
    let ratios = |nearfull: &str, backfillfull: &str, full: &str| {
        let now = [
            ("set-nearfull-ratio", nearfull),
            ("set-backfillfull-ratio", backfillfull),
            ("set-full-ratio", full),
        ];
        for (what, ratio) in now {
            cluster.tool(&["ceph", "osd", what, ratio]);
        }
    };
    // What is there can be written, and what is not there cannot.
    guest.zero_all();
    ratios("0.0001", "0.0002", "0.0003");
    let ring = &mut guest.session.rings[0];
    wait_for("it is full", || {
        let status = Request::write(8192, &[1; 4096]).run(ring).unwrap().status;
        let is_full = status == IOERR;
        // Makes place again for what is not to be there.
        let segment = Segment { sector: 8192, count: 8, flags: 1 };
        assert_eq!(Request::write_zeroes(&[segment]).run(ring).unwrap().status, OK);
        if is_full { Ok(()) } else { Err(status) }
    });
    host.says("Ceph refuses a write at 5242880: there is no space");
    guest.look();
    ratios("0.85", "0.9", "0.95");
    let ring = &mut guest.session.rings[0];
    wait_for("there is space", || match Request::write(8192, &[2; 4096]).run(ring).unwrap().status {
        OK => Ok(()),
        status => Err(status),
    });
    guest.data[8192 * 512..][..4096].fill(2);
    guest.work();
    let data = guest.leave();
    host.end();
    assert!(content(&rig, "volume", "t") == data);
}
