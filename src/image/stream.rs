//! An image that comes from standard input: raw bytes, one after the other, whose end shows only when it is
//! there.
//!
//! Whoever writes into a pipe and dies looks the same as one who has finished. So the length of a pipe's
//! image has to be known before ([`Stream::check_whole`]).
#![forbid(unsafe_code)]

use crate::base::{Context, Error, Kind, Result, wait};
use crate::image::foreign;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;

/// Standard input, of which nobody else reads.
pub struct Stream {
    file: File,
    /// Its length, if it is a file.
    len: Option<u64>,
    /// The first bytes, which were looked at and not read yet.
    ahead: VecDeque<u8>,
    start: Vec<u8>,
    /// The last bytes that were read.
    end: VecDeque<u8>,
}

impl Stream {
    /// Standard input, from where it stands.
    ///
    /// # Errors
    /// `Usage` for a terminal, and for a block device, which can be named.
    pub fn standard_input() -> Result<Self> {
        let input = std::io::stdin();
        let usage = |message: &str| Err(Error::new(Kind::Usage, message));
        if input.is_terminal() {
            return usage("standard input is a terminal; send an image into it by a pipe or from a file");
        }
        let mut file = File::from(input.as_fd().try_clone_to_owned()?);
        let found = file.metadata()?;
        if found.file_type().is_block_device() {
            return usage(
                "standard input is a block device; name the device itself, so that nobody else uses it",
            );
        }
        let len = match found.is_file() {
            true => Some(found.len().saturating_sub(std::io::Seek::stream_position(&mut file)?)),
            false => None,
        };
        Ok(Stream { file, len, ahead: VecDeque::new(), start: Vec::new(), end: VecDeque::new() })
    }

    /// How many bytes there are, where that is known: of a file.
    pub fn known_len(&self) -> Option<u64> {
        self.len
    }

    /// Waits for the first bytes, and looks at them. `watch` is asked again and again whether it shall go on.
    ///
    /// # Errors
    /// `Usage` for what begins like another form of an image; what `watch` says.
    pub fn check_start(&mut self, watch: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let mut start = vec![0; foreign::START];
        let len = self.read(&mut start, watch)?;
        start.truncate(len);
        self.ahead = start.iter().copied().collect();
        self.end.clear();
        self.start = start;
        if crate::image::begins_as_qcow2(&self.start) {
            let message = "standard input begins like qcow2, which cannot be read from one end to the \
                           other; write it into a file, and import that. To take it byte for byte all the \
                           same, say --format raw";
            return Err(Error::new(Kind::Usage, message));
        }
        self.check_form(&[])
    }

    /// Reads until `into` is full or the end is there, and returns the number of bytes.
    pub fn read(&mut self, into: &mut [u8], watch: &mut dyn FnMut() -> Result<()>) -> Result<usize> {
        let first = self.ahead.len().min(into.len());
        for (to, from) in into.iter_mut().zip(self.ahead.drain(..first)) {
            *to = from;
        }
        let mut done = first;
        while done < into.len() {
            watch()?;
            if !wait::readable(&self.file).context(|| "wait for standard input")? {
                continue;
            }
            match self.file.read(&mut into[done..]) {
                Ok(0) => break,
                Ok(len) => done += len,
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                Err(e) => return Err(e).context(|| "read standard input"),
            }
        }
        self.end.extend(&into[done.saturating_sub(foreign::END)..done]);
        let too_many = self.end.len().saturating_sub(foreign::END);
        self.end.drain(..too_many);
        Ok(done)
    }

    /// Looks whether the `got` bytes that were read are all of it: of a pipe, `size` but for less than a
    /// sector of `unit` bytes. `is_raw` says that its form does not matter.
    ///
    /// # Errors
    /// `Usage` if there is more, or less, or the end is that of another form of an image.
    pub fn check_whole(
        &mut self,
        got: u64,
        size: u64,
        unit: u64,
        is_raw: bool,
        watch: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let usage = |message: String| Err(Error::new(Kind::Usage, message));
        let end: Vec<u8> = self.end.iter().copied().collect();
        if self.read(&mut [0], watch)? != 0 {
            return usage(format!(
                "standard input has more than the volume's {size} bytes; say a larger --size"
            ));
        }
        match self.len {
            Some(len) if got < len => return usage("standard input became shorter meanwhile".into()),
            None if size - got >= unit => {
                return usage(format!(
                    "standard input ended after {got} bytes of {size}: whoever writes into it may have \
                     failed. If that is all, say --size {}",
                    got.next_multiple_of(unit)
                ));
            }
            _ => {}
        }
        if is_raw { Ok(()) } else { self.check_form(&end) }
    }

    fn check_form(&self, end: &[u8]) -> Result<()> {
        match foreign::recognise(&self.start, end) {
            Some(foreign) => Err(Error::new(Kind::Usage, foreign.advice_on_stream())),
            None => Ok(()),
        }
    }
}
