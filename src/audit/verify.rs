//! Whether an audit log is what was written: the first record that is not, and how that shows.
//!
//! [`Checker`] is pure: it takes lines and marks. What it can find and what it cannot, docs/audit.md argues.

use crate::audit::line::{self, AuditKey, LINE_MAX, Line, Position};
use crate::audit::mark::{self, Kind as MarkKind, Mark, is_near};
use crate::base::root::files;
use crate::base::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// In what way a log is not what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Damage {
    /// A record is not the one that was written, or is no record any more.
    Changed,
    /// Records are missing between two others, or at the beginning.
    Missing,
    /// A record stands where it was not written: moved, repeated, or brought from elsewhere.
    Misplaced,
    /// Records are missing at the end.
    CutOff,
    /// A mark is not the one that was written.
    Mark,
}

/// The first thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// In what way.
    pub damage: Damage,
    /// The first record that is bad or missing; none if it is a mark.
    pub record: Option<u64>,
    /// The line of the file where that shows, from 1; none for what is missing at the end.
    pub line: Option<u64>,
    /// What is wrong, for the reader.
    pub message: String,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// How many records are right, from the first on.
    pub records: u64,
    /// How many of them have a MAC that was checked.
    pub authenticated: u64,
    /// How many have a MAC that could not be checked, for want of the key.
    pub unchecked: u64,
    /// Up to which record the marks vouch that nothing is missing at the end.
    pub marked: Option<u64>,
    /// Lines that crashes have left of records that were never finished.
    pub unfinished: Vec<u64>,
    /// What is wrong, if anything.
    pub problem: Option<Problem>,
}

/// Checks a log line by line.
pub struct Checker<'a> {
    key: Option<&'a AuditKey>,
    marks: Vec<(Mark, PathBuf)>,
    log: Option<Uuid>,
    place: Position,
    /// Whether the last record's line is held by a MAC of its own.
    proved: bool,
    line: u64,
    /// The first of the lines since the last record that are none.
    odd: Option<u64>,
    /// The second of two records of which one was changed, and its line.
    suspect: Option<(Position, u64)>,
    report: Report,
}

impl<'a> Checker<'a> {
    /// For a log that must hold the places of `marks`, which are proved or trusted, each
    /// with the path of its file.
    pub fn new(key: Option<&'a AuditKey>, marks: Vec<(Mark, PathBuf)>) -> Self {
        Checker {
            key,
            marks,
            log: None,
            place: Position::START,
            proved: true,
            line: 0,
            odd: None,
            suspect: None,
            report: Report::default(),
        }
    }

    /// Takes the next line, without its end; a last one that has no end is `torn`. Of what comes after the
    /// first problem is only looked at whether it is what is missing.
    pub fn line(&mut self, bytes: &[u8], torn: bool) {
        if self.report.problem.is_some() {
            if let Some(line) = line::parse(bytes).filter(|_| !torn) {
                self.judge_again(&line);
            }
            return;
        }
        self.line += 1;
        let parsed = if torn { None } else { line::parse(bytes) };
        let Some(line) = parsed else {
            self.odd.get_or_insert(self.line);
            self.report.unfinished.push(self.line);
            return;
        };
        self.report.problem = self.check(&line);
        if self.report.problem.is_some() {
            return;
        }
        self.odd = None;
        self.log = Some(line.log);
        self.place = line.position;
        self.report.records += 1;
        self.proved = line.mac.as_ref().is_some_and(|mac| self.key_of(mac.store).is_some());
        match (self.proved, line.mac) {
            (true, _) => self.report.authenticated += 1,
            (false, Some(_)) => self.report.unchecked += 1,
            (false, None) => {}
        }
        self.report.problem = self.check_marks();
    }

    /// What was found, all lines taken.
    pub fn finish(mut self) -> Report {
        let last = self.place.seq;
        if self.report.problem.is_none() {
            self.report.problem = self.cut_off();
        }
        let suspect = self.suspect.map_or(0, |(suspect, _)| suspect.seq);
        if let Some((mark, _)) = self.marks.iter().find(|(mark, _)| mark.position.seq == suspect) {
            self.convict(mark.position.chain);
        }
        // The last record that was taken may be the one that its successor says is not the right one.
        let bad = self.report.problem.as_ref().and_then(|problem| problem.record);
        self.report.records = bad.map_or(self.report.records, |bad| self.report.records.min(bad - 1));
        let log = self.log;
        let of_log = self.marks.iter().filter(|(mark, _)| log == Some(mark.log));
        self.report.marked = of_log.map(|(mark, _)| mark.position.seq).max().map(|seq| seq.min(last));
        self.report
    }

    fn key_of(&self, store: Uuid) -> Option<&'a AuditKey> {
        self.key.filter(|key| key.store() == store)
    }

    fn check(&mut self, line: &Line<'_>) -> Option<Problem> {
        let (seq, expected) = (line.position.seq, self.place.seq + 1);
        let here = Some(self.line);
        if let Some(mac) = &line.mac
            && let Some(key) = self.key_of(mac.store)
            && !mac.is_of(key)
        {
            // Its number may be what was changed.
            let message = format!("record {expected} was changed: its MAC does not match");
            return problem(Damage::Changed, expected, here, message);
        }
        if self.log.is_some_and(|log| log != line.log) {
            let message = format!("record {seq} of another log ({}) stands in place of {expected}", line.log);
            return problem(Damage::Misplaced, expected, here, message);
        }
        if line.of_kms && line.mac.is_none() {
            let message = format!("record {expected} says that it is the KMS's, but has no MAC");
            return problem(Damage::Changed, expected, here, message);
        }
        if seq == expected && line.prev == self.place.chain {
            return None;
        }
        // What is no record in between was one, then: nothing that a crash leaves counts.
        if let Some(odd) = self.odd {
            let message = format!("record {expected} was changed: line {odd} is no record any more");
            return problem(Damage::Changed, expected, Some(odd), message);
        }
        if seq > expected {
            let message = match seq - 1 {
                last if last == expected => format!("record {expected} is missing before record {seq}"),
                last => format!("records {expected} to {last} are missing before record {seq}"),
            };
            return problem(Damage::Missing, expected, here, message);
        }
        if seq < expected {
            let message = format!("record {seq} stands where record {expected} should be");
            return problem(Damage::Misplaced, expected, here, message);
        }
        self.broken_link(line)
    }

    /// Two records that follow each other by their numbers, of which the second names
    /// another one as the first.
    fn broken_link(&mut self, line: &Line<'_>) -> Option<Problem> {
        let (first, second) = (self.place.seq, line.position.seq);
        let second_is_proved = line.mac.as_ref().is_some_and(|mac| self.key_of(mac.store).is_some());
        if self.place == Position::START || (self.proved && !second_is_proved) {
            let message = format!("record {second} was changed: it does not follow the one before it");
            return problem(Damage::Changed, second, Some(self.line), message);
        }
        if self.proved {
            // Both are genuine: so there were others between them, and somebody wrote on
            // with a log that was cut.
            let message = format!(
                "record {second} follows another record {first} than the one that is there: part of the log \
                 was replaced"
            );
            return problem(Damage::Misplaced, second, Some(self.line), message);
        }
        self.suspect = Some((line.position, self.line));
        let message = format!("record {first} was changed: record {second} names another one before it");
        problem(Damage::Changed, first, Some(self.line - 1), message)
    }

    /// Learns more of the first problem from a record further down.
    fn judge_again(&mut self, line: &Line<'_>) {
        let Some(problem) = &mut self.report.problem else { return };
        let seq = line.position.seq;
        if problem.damage == Damage::Missing && problem.record == Some(seq) {
            problem.damage = Damage::Misplaced;
            problem.message = format!("record {seq} was moved behind later ones");
        }
        if let Some((suspect, _)) = self.suspect
            && seq == suspect.seq + 1
        {
            self.convict(line.prev);
        }
    }

    /// Of two records one was changed: the second, if what vouches for it, `chain`, does
    /// not fit; else the first.
    fn convict(&mut self, chain: [u8; 32]) {
        if let Some((second, line)) = self.suspect.take()
            && second.chain != chain
        {
            let message = format!("record {} was changed: it does not follow the one before it", second.seq);
            self.report.problem = problem(Damage::Changed, second.seq, Some(line), message);
        }
    }

    /// Whether the record that was just taken is the one that a mark names.
    fn check_marks(&self) -> Option<Problem> {
        let (seq, log) = (self.place.seq, self.log);
        let other = |(mark, _): &&(Mark, PathBuf)| {
            log != Some(mark.log) || (mark.position.seq == seq && mark.position.chain != self.place.chain)
        };
        let (mark, path) = self.marks.iter().find(other)?;
        let (damage, message) = match log == Some(mark.log) {
            true => (
                Damage::Changed,
                format!(
                    "record {seq} is not the one that {} names: it was changed, or the log was written anew \
                     up to it",
                    path.display()
                ),
            ),
            false => (
                Damage::Misplaced,
                format!(
                    "the log is another one than {} names: it was replaced or begun anew. If the store was, \
                     remove that file",
                    path.display()
                ),
            ),
        };
        problem(damage, seq, Some(self.line), message)
    }

    fn cut_off(&self) -> Option<Problem> {
        let last = self.place.seq;
        let (mark, path) = self.marks.iter().max_by_key(|(mark, _)| mark.position.seq)?;
        if mark.position.seq <= last {
            return None;
        }
        let signed =
            self.marks.iter().filter(|(_, path)| !mark::is_plain(path)).map(|(mark, _)| mark.position.seq);
        if mark::is_plain(path) && !is_near(mark.position.seq, signed.chain([last]).max().unwrap_or(last)) {
            let message = format!(
                "{} names record {}, which is far beyond everything else that tells how far the log reached: \
                 a host process has written that which is none of ours. The next record without a MAC puts \
                 the file right",
                path.display(),
                mark.position.seq
            );
            return Some(Problem { damage: Damage::Mark, record: None, line: None, message });
        }
        if let Some(odd) = self.odd {
            let message = format!("record {} was changed: line {odd} is no record any more", last + 1);
            return problem(Damage::Changed, last + 1, Some(odd), message);
        }
        let message = format!(
            "the log ends with record {last}, but record {} was written ({} names it): its end was cut off, \
             or an older copy was put in its place",
            mark.position.seq,
            path.display()
        );
        problem(Damage::CutOff, last + 1, None, message)
    }
}

fn problem(damage: Damage, record: u64, line: Option<u64>, message: String) -> Option<Problem> {
    Some(Problem { damage, record: Some(record), line, message })
}

/// Checks the log in `folder` against its marks in `config`. Without `key` MACs are not checked.
///
/// Writers are kept waiting for the moment of reading the marks only: what they append
/// later is not looked at.
pub fn verify(folder: &Path, config: &Path, key: Option<&AuditKey>) -> Result<Report> {
    let path = folder.join(crate::audit::FILE);
    let attempt = || format!("read the audit log {}", path.display());
    let file = match files::open(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        opened => Some(opened.context(attempt)?),
    };
    let (len, marks) = match &file {
        Some(file) => {
            let file = file.try_clone().context(attempt)?;
            let file = Flock::lock(file, FlockArg::LockShared).map_err(|(_, e)| e).context(attempt)?;
            let log = first_log(&file).context(attempt)?;
            (file.metadata().context(attempt)?.len(), marks(folder, config, log, key))
        }
        None => (0, marks(folder, config, None, key)),
    };
    let marks = match marks {
        Ok(marks) => marks,
        Err(problem) => return Ok(Report { problem: Some(problem), ..Report::default() }),
    };
    let mut checker = Checker::new(key, marks);
    if let Some(mut file) = file {
        file.rewind().context(attempt)?;
        let take = |bytes: &[u8], torn| {
            checker.line(bytes, torn);
            ControlFlow::Continue(())
        };
        each_line(file.take(len), take).context(attempt)?;
    }
    Ok(checker.finish())
}

/// The marks that the log in `folder` must hold: its own, and those that were made for one in the same place.
fn marks(
    folder: &Path,
    config: &Path,
    log: Option<Uuid>,
    key: Option<&AuditKey>,
) -> Result<Vec<(Mark, PathBuf)>, Problem> {
    let of_folder = mark::of_folder(config, folder).map(|mark| mark.log);
    let mut logs: Vec<Uuid> = log.into_iter().chain(of_folder).collect();
    logs.dedup();
    let mut marks = Vec::new();
    for (log, kind) in logs.iter().flat_map(|&log| [(log, MarkKind::Signed), (log, MarkKind::Plain)]) {
        let path = mark::path(config, log, kind);
        let bytes = match files::read(&path, mark::READ_MAX) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            // As one that is damaged.
            read => read.unwrap_or_else(|_| vec![b'?']),
        };
        // Made, and cut off by a power failure before it was first written: as good as one that is not there.
        if bytes.iter().all(|&byte| byte == 0) {
            continue;
        }
        let damaged = || Problem {
            damage: Damage::Mark,
            record: None,
            line: None,
            message: format!("{} is damaged, or was changed", path.display()),
        };
        let (mark, mac) = Mark::parse(&bytes).filter(|(mark, _)| mark.log == log).ok_or_else(damaged)?;
        let authentic = match (kind, mac, key) {
            (MarkKind::Signed, Some(mac), Some(key)) => mark.is_authentic(&mac, key),
            (MarkKind::Signed, mac, _) => mac.is_some(),
            (MarkKind::Plain, ..) => true,
        };
        if !authentic {
            return Err(damaged());
        }
        marks.push((mark, path));
    }
    Ok(marks)
}

/// The log that the first record in the file belongs to.
fn first_log(mut file: &File) -> std::io::Result<Option<Uuid>> {
    let mut log = None;
    file.rewind()?;
    each_line(file, |bytes, torn| {
        let line = if torn { None } else { line::parse(bytes) };
        match line {
            None => ControlFlow::Continue(()),
            Some(line) => {
                log = Some(line.log);
                ControlFlow::Break(())
            }
        }
    })?;
    Ok(log)
}

/// Hands on each line of `file` without its end, and whether it had none. Of a line that is too long to be a
/// record, its beginning.
pub fn each_line(
    file: impl Read,
    mut take: impl FnMut(&[u8], bool) -> ControlFlow<()>,
) -> std::io::Result<()> {
    let mut reader = BufReader::with_capacity(LINE_MAX, file);
    let mut line = Vec::new();
    loop {
        line.clear();
        if (&mut reader).take(LINE_MAX as u64).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let whole = line.pop_if(|last| *last == b'\n').is_some();
        let too_long = !whole && line.len() == LINE_MAX;
        if too_long {
            reader.skip_until(b'\n')?;
        }
        if take(&line, !whole && !too_long).is_break() {
            return Ok(());
        }
    }
}
