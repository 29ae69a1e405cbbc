//! `sealblk top`: what attached volumes do, on a terminal, live.
//!
//! The screen is drawn with the few control sequences that every terminal knows (ECMA-48), and not by a
//! library for such programs: that would be forty crates beside the code that has keys.
#![forbid(unsafe_code)]

use crate::base::sync::Locked;
use crate::base::{Context, Error, Kind, Result, printable, size};
use crate::cli::Env;
use crate::cli::stats::{interval, milliseconds, shown_name};
use crate::host::stats::Stats;
use crate::ops::observe::{Observed, Observer, PATIENCE};
use crate::ops::rates::Rates;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{self, LocalFlags, SetArg, SpecialCharacterIndices, Termios};
use std::cmp::Ordering;
use std::collections::HashMap;
use std::io::{IsTerminal, Read, Stdin, Write, stdin, stdout};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What `top` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  sealblk top

Keys: left and right choose the column that volumes are sorted by, r turns the order round, up and down move through \
volumes that do not fit, q ends it. The columns are those of \"sealblk stats\".")]
pub struct TopArgs {
    /// Look again every so many seconds.
    #[arg(long, short, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: Duration,
}

/// The screen, the cursor's place, and what is shown how.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const TO_END_OF_LINE: &str = "\x1b[K";
const TO_END_OF_SCREEN: &str = "\x1b[J";
const REVERSED: &str = "\x1b[7m";
const BOLD: &str = "\x1b[1m";
const PLAIN: &str = "\x1b[0m";
/// Where the terminal does not say how large it is.
const USUAL: (usize, usize) = (80, 24);
/// Lines above the volumes.
const ABOVE: usize = 3;

/// A column: its head, what it shows, and what it is sorted by. The first is sorted by names.
struct Column {
    head: &'static str,
    show: fn(&Rates) -> String,
    by: fn(&Rates) -> f64,
}

const COLUMNS: [Column; 11] = [
    Column { head: "r/s", show: |it| whole(it.read.per_second), by: |it| it.read.per_second },
    Column { head: "w/s", show: |it| whole(it.write.per_second), by: |it| it.write.per_second },
    Column { head: "read/s", show: |it| bytes(it.read.bytes_per_second), by: |it| it.read.bytes_per_second },
    Column {
        head: "written/s",
        show: |it| bytes(it.write.bytes_per_second),
        by: |it| it.write.bytes_per_second,
    },
    Column {
        head: "r_await",
        show: |it| milliseconds(it.read.took.await_ms),
        by: |it| of(it.read.took.await_ms),
    },
    Column {
        head: "w_await",
        show: |it| milliseconds(it.write.took.await_ms),
        by: |it| of(it.write.took.await_ms),
    },
    Column {
        head: "f_await",
        show: |it| milliseconds(it.flush.took.await_ms),
        by: |it| of(it.flush.took.await_ms),
    },
    Column { head: "p99", show: |it| milliseconds(it.both.p99_ms), by: |it| of(it.both.p99_ms) },
    Column { head: "aqu-sz", show: |it| format!("{:.1}", it.queue_length), by: |it| it.queue_length },
    Column { head: "thr/s", show: |it| whole(it.throttled_per_second), by: |it| it.throttled_per_second },
    Column { head: "err", show: |it| it.errors.to_string(), by: |it| it.errors as f64 },
];

fn whole(n: f64) -> String {
    format!("{n:.0}")
}

fn bytes(n: f64) -> String {
    size::about(n as u64)
}

fn of(ms: Option<f64>) -> f64 {
    ms.unwrap_or(-1.0)
}

/// What is shown of one volume.
struct Row {
    name: String,
    /// None of one whose process does not answer.
    rates: Option<Rates>,
}

/// What the thread that asks has found, or why it has found nothing.
type Found = Arc<Mutex<Option<Result<Vec<Row>>>>>;

/// How it is shown.
struct View {
    /// 0 is the name, and then the columns.
    sorted_by: usize,
    /// The largest first; names from the first letter on.
    largest_first: bool,
    /// The first volume that is shown.
    first: usize,
}

/// Shows attached volumes until `q`.
pub fn run(env: &Env, args: &TopArgs) -> Result<()> {
    if env.json || !stdin().is_terminal() || !stdout().is_terminal() {
        let message = "top wants a terminal; \"sealblk stats --interval 1\" goes anywhere";
        return Err(Error::new(Kind::Usage, message));
    }
    let (news, tells) = UnixStream::pair().context(|| "make a socket pair")?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP, signal_hook::consts::SIGWINCH] {
        let told = tells.try_clone().context(|| "copy a file descriptor")?;
        // What came is told by a byte; which it was, by a flag.
        signal_hook::low_level::pipe::register(signal, told).context(|| "watch for signals")?;
    }
    let over = Arc::default();
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&over)).context(|| "watch for signals")?;
    }
    let found = Found::default();
    look(Observer::new(env.catalog(), PATIENCE), args.interval, found.clone(), tells)?;
    let screen = Screen::enter()?;
    let mut view = View { sorted_by: 1, largest_first: true, first: 0 };
    loop {
        screen.draw(&mut view, &found)?;
        let keys = screen.wait(&news)?;
        if over.load(std::sync::atomic::Ordering::Relaxed) || !keys.is_none_or(|keys| view.press(&keys)) {
            return Ok(());
        }
    }
}

/// Starts the thread that asks: a volume that does not answer keeps no key from being heard.
fn look(observer: Observer, interval: Duration, found: Found, mut tells: UnixStream) -> Result<()> {
    let look = move || {
        let mut before: HashMap<_, Stats> = HashMap::new();
        let mut due = Instant::now();
        loop {
            let observed = observer.look(None);
            let rows = observed.map(|observed| {
                let rows = observed.iter().filter_map(|it| row(it, &before)).collect();
                before = observed.into_iter().filter_map(|it| Some((it.entry.id, it.stats?.ok()?))).collect();
                rows
            });
            *found.locked() = Some(rows);
            if tells.write_all(b".").is_err() {
                return;
            }
            due = (due + interval).max(Instant::now());
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    };
    std::thread::Builder::new().name("look".into()).spawn(look).map(drop).context(|| "start a thread")
}

fn row(it: &Observed, before: &HashMap<crate::catalog::VolumeId, Stats>) -> Option<Row> {
    let rates = match it.stats.as_ref()? {
        Ok(stats) => Some(Rates::between(before.get(&it.entry.id), stats)),
        Err(_) => None,
    };
    Some(Row { name: printable::line(&shown_name(it)).into_owned(), rates })
}

impl View {
    /// Does what keys mean; returns whether to go on.
    fn press(&mut self, keys: &[u8]) -> bool {
        let columns = COLUMNS.len() + 1;
        let mut rest = keys;
        while let Some(&key) = rest.first() {
            // An arrow is three bytes.
            let (arrow, len) = match rest {
                [0x1b, b'[' | b'O', arrow, ..] => (Some(arrow), 3),
                _ => (None, 1),
            };
            rest = &rest[len..];
            match (arrow, key) {
                (Some(b'A'), _) => self.first = self.first.saturating_sub(1),
                (Some(b'B'), _) => self.first += 1,
                (Some(b'C'), _) => self.sorted_by = (self.sorted_by + 1) % columns,
                (Some(b'D'), _) => self.sorted_by = (self.sorted_by + columns - 1) % columns,
                // Ctrl-C and Ctrl-D as well.
                (None, b'q' | 3 | 4) => return false,
                (None, b'r') => self.largest_first = !self.largest_first,
                _ => {}
            }
        }
        true
    }

    fn sort(&self, rows: &mut [Row]) {
        rows.sort_by(|a, b| {
            let by_name = a.name.cmp(&b.name);
            let order = match self.sorted_by.checked_sub(1).and_then(|column| COLUMNS.get(column)) {
                None => by_name.reverse(),
                Some(column) => {
                    // What does not answer is looked at first.
                    let value = |row: &Row| row.rates.as_ref().map_or(f64::INFINITY, column.by);
                    value(a).partial_cmp(&value(b)).unwrap_or(Ordering::Equal).then(by_name.reverse())
                }
            };
            if self.largest_first { order.reverse() } else { order }
        });
    }

    /// All lines, each as wide as the terminal at most.
    fn lines(&mut self, rows: &mut [Row], (width, height): (usize, usize)) -> Vec<String> {
        self.sort(rows);
        let fit = height.saturating_sub(ABOVE).max(1);
        self.first = self.first.min(rows.len().saturating_sub(fit));
        let answering = || rows.iter().filter_map(|row| row.rates.as_ref());
        let sum = |of: fn(&Rates) -> f64| answering().map(of).sum::<f64>();
        let title = format!(
            "sealblk top: {}, {:.0} requests/s, {}/s read, {}/s written; {} errors  (arrows sort, r \
             reverses, q quits)",
            match rows.len() {
                1 => "1 volume attached".into(),
                n => format!("{n} volumes attached"),
            },
            sum(|it| it.read.per_second + it.write.per_second),
            bytes(sum(|it| it.read.bytes_per_second)),
            bytes(sum(|it| it.write.bytes_per_second)),
            answering().map(|it| it.errors).sum::<u64>(),
        );
        let mut table =
            vec![["VOLUME"].into_iter().chain(COLUMNS.map(|c| c.head)).map(String::from).collect()];
        for row in rows.iter() {
            let mut cells = vec![row.name.clone()];
            match &row.rates {
                Some(rates) => cells.extend(COLUMNS.iter().map(|column| (column.show)(rates))),
                None => cells.push("does not answer".into()),
            }
            table.push(cells);
        }
        let widths = widths(&table);
        let mut lines = vec![format!("{BOLD}{}{PLAIN}", cut(&title, width)), String::new()];
        lines.push(self.head(&table[0], &widths, width));
        let shown = table[1..].iter().skip(self.first).take(fit);
        lines.extend(shown.map(|cells| cut(&aligned(cells, &widths), width)));
        lines
    }

    /// The head, with the column marked that volumes are sorted by.
    fn head(&self, heads: &[String], widths: &[usize], width: usize) -> String {
        let line = cut(&aligned(heads, widths), width);
        let begin = widths[..self.sorted_by].iter().map(|width| width + 2).sum::<usize>();
        let chars: Vec<char> = line.chars().collect();
        let (begin, end) = (begin.min(chars.len()), (begin + widths[self.sorted_by]).min(chars.len()));
        let part = |range: std::ops::Range<usize>| chars[range].iter().collect::<String>();
        format!("{}{REVERSED}{}{PLAIN}{}", part(0..begin), part(begin..end), part(end..chars.len()))
    }
}

fn widths(table: &[Vec<String>]) -> Vec<usize> {
    let wide = |column: usize| {
        // "does not answer" may go over several columns.
        let cells =
            table.iter().filter(|cells| column == 0 || cells.len() > 2).filter_map(|cells| cells.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    (0..=COLUMNS.len()).map(wide).collect()
}

/// Cells in their columns: the name to the left, numbers to the right.
fn aligned(cells: &[String], widths: &[usize]) -> String {
    let mut line = String::new();
    for (column, (cell, width)) in cells.iter().zip(widths).enumerate() {
        let cell = match column {
            0 => format!("{cell:width$}"),
            _ if cells.len() == 2 => format!("  {cell}"),
            _ => format!("  {cell:>width$}"),
        };
        line.push_str(&cell);
    }
    line
}

fn cut(line: &str, width: usize) -> String {
    line.chars().take(width).collect()
}

/// The terminal, while it is used so. It is put back at the end, however that comes.
struct Screen {
    before: Termios,
    keys: Stdin,
}

impl Screen {
    fn enter() -> Result<Self> {
        let keys = stdin();
        let before = termios::tcgetattr(&keys).context(|| "ask for the terminal's settings")?;
        let mut raw = before.clone();
        // Keys come at once, and are not shown; Ctrl-C is one of them.
        raw.local_flags &= !(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG);
        raw.control_chars[SpecialCharacterIndices::VMIN as usize] = 0;
        raw.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
        termios::tcsetattr(&keys, SetArg::TCSADRAIN, &raw).context(|| "set the terminal")?;
        let screen = Screen { before, keys };
        print(ENTER)?;
        Ok(screen)
    }

    fn draw(&self, view: &mut View, found: &Found) -> Result<()> {
        let mut found = found.locked();
        let lines = match &mut *found {
            None => vec!["asking …".to_string()],
            Some(Ok(rows)) => view.lines(rows, self.size()),
            Some(Err(e)) => vec![printable::line(&e.to_string()).into_owned()],
        };
        let mut text = String::from(HOME);
        for (n, line) in lines.iter().enumerate() {
            let gap = if n == 0 { "" } else { "\r\n" };
            text.push_str(&format!("{gap}{line}{TO_END_OF_LINE}"));
        }
        text.push_str(TO_END_OF_SCREEN);
        print(&text)
    }

    /// Waits for a key, or for something new to show. Returns what keys were pressed, if any.
    fn wait(&self, news: &UnixStream) -> Result<Option<Vec<u8>>> {
        let mut fds =
            [PollFd::new(self.keys.as_fd(), PollFlags::POLLIN), PollFd::new(news.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            // A signal that is told of by `news`.
            Err(nix::errno::Errno::EINTR) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        let (key, new) = (fds[0].any().unwrap_or(true), fds[1].any().unwrap_or(true));
        let mut bytes = [0; 64];
        if new {
            let _ = (&*news).read(&mut bytes);
        }
        if !key {
            return Ok(None);
        }
        match self.keys.lock().read(&mut bytes) {
            // The terminal is gone.
            Ok(0) => Ok(Some(b"q".to_vec())),
            Ok(n) => Ok(Some(bytes[..n].to_vec())),
            Err(e) => Err(Error::from(e).context("read from the terminal")),
        }
    }

    fn size(&self) -> (usize, usize) {
        match terminal_size::terminal_size_of(stdout()) {
            Some((width, height)) if width.0 > 0 && height.0 > 0 => (width.0.into(), height.0.into()),
            _ => USUAL,
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = print(LEAVE);
        let _ = termios::tcsetattr(&self.keys, SetArg::TCSADRAIN, &self.before);
    }
}

fn print(text: &str) -> Result<()> {
    let mut out = stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|e| Error::from(e).context("write to the terminal"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::queue::counters::{KindStats, QueueStats};

    fn row(name: &str, reads: u64) -> Row {
        let read = KindStats { requests: reads, bytes: reads << 20, errors: 0 };
        let queues = vec![QueueStats { read, ..QueueStats::default() }];
        let stats = Stats { since_ns: 1_000_000_000, queues, ..Stats::default() };
        Row { name: name.into(), rates: Some(Rates::between(None, &stats)) }
    }

    fn names(lines: &[String]) -> Vec<&str> {
        lines[ABOVE..].iter().filter_map(|line| line.split_whitespace().next()).collect()
    }

    #[test]
    fn volumes_are_sorted_as_keys_say_and_fit_the_screen() {
        let mut rows =
            vec![row("a", 5), row("b", 700), row("c", 30), Row { name: "dead".into(), rates: None }];
        let mut view = View { sorted_by: 1, largest_first: true, first: 0 };
        let lines = view.lines(&mut rows, (120, 24));
        assert_eq!(names(&lines), ["dead", "b", "c", "a"]);
        assert!(lines[ABOVE].ends_with("does not answer"), "{lines:?}");
        assert!(lines[0].contains("4 volumes attached, 735 requests/s, 735.0 MiB/s read"), "{lines:?}");
        assert!(lines[2].contains("r/s\x1b[0m"), "{lines:?}");
        assert!(view.press(b"r"));
        assert_eq!(names(&view.lines(&mut rows, (120, 24))), ["a", "c", "b", "dead"]);
        assert!(view.press(b"\x1b[D\x1b[Br") && view.sorted_by == 0);
        let lines = view.lines(&mut rows, (20, 5));
        assert_eq!(names(&lines), ["b", "c"]);
        assert!(lines[ABOVE..].iter().all(|line| line.chars().count() <= 20), "{lines:?}");
        assert!(view.press(b"\x1b[B\x1b[B\x1b[B\x1b[B"));
        assert_eq!(names(&view.lines(&mut rows, (20, 5))), ["c", "dead"]);
        assert!(!view.press(b"xq") && !view.press(b"\x03"));
    }
}
