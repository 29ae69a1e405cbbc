//! Standard output, into which an export goes from one end to the other.
#![forbid(unsafe_code)]

use super::Whole;
use crate::base::{Context, Error, Kind, Result, wait};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

/// Bytes that a pipe may hold: what the kernel lets everybody have.
const PIPE: i32 = 1 << 20;
/// Zeros that are written at a time.
const ZEROS: usize = 64 << 10;

/// Standard output, which nobody else writes to.
pub(super) struct Stream {
    out: File,
    /// Whether it is a file in which zeros can be left out: nothing is behind where it stands.
    has_holes: bool,
    is_file: bool,
}

impl Stream {
    /// # Errors
    /// `Usage` for a terminal, and for a block device, which can be named.
    pub(super) fn standard_output() -> Result<Self> {
        let output = std::io::stdout();
        let usage = |message: &str| Err(Error::new(Kind::Usage, message));
        if output.is_terminal() {
            return usage("standard output is a terminal; send it into a pipe or a file");
        }
        let mut out = File::from(output.as_fd().try_clone_to_owned()?);
        let found = out.metadata()?;
        if found.file_type().is_block_device() {
            return usage(
                "standard output is a block device; name the device itself, so that nobody else uses it",
            );
        }
        let mut has_holes = false;
        if found.is_file() {
            let flags = OFlag::from_bits_retain(fcntl(&out, FcntlArg::F_GETFL)?);
            has_holes = !flags.contains(OFlag::O_APPEND) && out.stream_position()? >= found.len();
        }
        if found.file_type().is_fifo() {
            // Opened anew, so that only this process does not wait in it: then a signal ends it although
            // nobody reads. A pipe that another user has made cannot be opened; there a signal in the wrong
            // moment has to come twice.
            let path = format!("/proc/self/fd/{}", out.as_raw_fd());
            let anew = File::options().write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
            out = anew.unwrap_or(out);
            // Larger, it is only quicker.
            let _ = fcntl(&out, FcntlArg::F_SETPIPE_SZ(PIPE));
        }
        Ok(Stream { out, has_holes, is_file: found.is_file() })
    }

    /// What it is, for the audit log: "standard output (pipe:[12])".
    pub(super) fn name(&self) -> String {
        let leads_to = std::fs::read_link(format!("/proc/self/fd/{}", self.out.as_raw_fd()));
        leads_to.map_or("standard output".into(), |to| format!("standard output ({})", to.display()))
    }

    fn write_all(&mut self, bytes: &[u8], watch: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            watch()?;
            if !wait::writable(&self.out).context(|| "wait for standard output")? {
                continue;
            }
            match self.out.write(rest) {
                Ok(len) => rest = &rest[len..],
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                Err(e) if e.kind() == ErrorKind::BrokenPipe => {
                    return Err(Error::new(Kind::Other, "whoever reads standard output has gone away"));
                }
                Err(e) => return Err(e).context(|| "write standard output"),
            }
        }
        Ok(())
    }
}

impl Whole for Stream {
    fn check_size(&self, _: u64) -> Result<()> {
        Ok(())
    }

    fn write(&mut self, _: u64, bytes: &[u8], watch: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.write_all(bytes, watch)
    }

    fn zeros(&mut self, range: Range<u64>, watch: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let mut len = range.end - range.start;
        if self.has_holes {
            let len = i64::try_from(len).map_err(std::io::Error::other)?;
            return self.out.seek(SeekFrom::Current(len)).map(drop).context(|| "write standard output");
        }
        let zeros = [0; ZEROS];
        while len > 0 {
            let part = len.min(zeros.len() as u64);
            self.write_all(&zeros[..part as usize], watch)?;
            len -= part;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let mut finish = || -> std::io::Result<()> {
            if self.has_holes {
                let end = self.out.stream_position()?;
                self.out.set_len(end)?;
            }
            if self.is_file { self.out.sync_all() } else { Ok(()) }
        };
        finish().context(|| "write standard output")
    }

    fn after_early_end(&self) -> String {
        "what standard output got is not the whole disk".into()
    }
}
