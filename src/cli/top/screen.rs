//! The screen of `top`: who asks, what is shown, and the terminal while it is used so.
#![forbid(unsafe_code)]

use crate::base::sync::Locked;
use crate::base::{Context, Error, Kind, Result, printable, size};
use crate::cli::Env;
use crate::cli::interval::Reports;
use crate::cli::stats::{milliseconds, shown_name};
use crate::host::stats::Stats;
use crate::ops::observe::{Observed, Observer, PATIENCE};
use crate::ops::rates::Rates;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use ratatui::layout::{Alignment, Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Row, Table};
use ratatui::{DefaultTerminal, Frame};
use std::cmp::Ordering;
use std::collections::HashMap;
use std::io::{IsTerminal, Read, Write, stdin, stdout};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

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
/// Between two columns.
const GAP: u16 = 2;
const SILENT: &str = "does not answer";

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
struct Shown {
    name: String,
    /// None of one whose process does not answer.
    rates: Option<Rates>,
}

/// What the thread that asks has found, or why it has found nothing.
type Found = Arc<Mutex<Option<Result<Vec<Shown>>>>>;

pub(super) fn run(env: &Env, interval: Duration) -> Result<()> {
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
    look(Observer::new(env.catalog(), PATIENCE), interval, found.clone(), tells)?;
    let mut screen = Screen::enter()?;
    let mut view = View { sorted_by: 1, largest_first: true, first: 0 };
    loop {
        screen
            .0
            .draw(|frame| view.draw(frame, found.locked().as_mut()))
            .context(|| "draw on the terminal")?;
        let keys = wait(&news)?;
        if over.load(std::sync::atomic::Ordering::Relaxed) || !keys.is_none_or(|keys| view.press(&keys)) {
            return Ok(());
        }
    }
}

/// Starts the thread that asks: a volume that does not answer keeps no key from being heard.
fn look(observer: Observer, interval: Duration, found: Found, mut tells: UnixStream) -> Result<()> {
    let look = move || {
        let mut before: HashMap<_, Stats> = HashMap::new();
        let mut reports = Reports::every(interval);
        loop {
            let observed = observer.look(None);
            let rows = observed.map(|observed| {
                let rows = observed.iter().filter_map(|it| shown(it, &before)).collect();
                before = observed.into_iter().filter_map(|it| Some((it.entry.id, it.stats?.ok()?))).collect();
                rows
            });
            *found.locked() = Some(rows);
            if tells.write_all(b".").is_err() {
                return;
            }
            reports.wait();
        }
    };
    std::thread::Builder::new().name("look".into()).spawn(look).map(drop).context(|| "start a thread")
}

fn shown(it: &Observed, before: &HashMap<crate::catalog::VolumeId, Stats>) -> Option<Shown> {
    let rates = match it.stats.as_ref()? {
        Ok(stats) => Some(Rates::between(before.get(&it.entry.id), stats)),
        Err(_) => None,
    };
    Some(Shown { name: printable::line(&shown_name(it)).into_owned(), rates })
}

/// Waits for a key, or for something new to show. Returns what keys were pressed, if any.
fn wait(news: &UnixStream) -> Result<Option<Vec<u8>>> {
    let keys = stdin();
    let mut fds =
        [PollFd::new(keys.as_fd(), PollFlags::POLLIN), PollFd::new(news.as_fd(), PollFlags::POLLIN)];
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
    match keys.lock().read(&mut bytes) {
        // The terminal is gone.
        Ok(0) => Ok(Some(b"q".to_vec())),
        Ok(n) => Ok(Some(bytes[..n].to_vec())),
        Err(e) => Err(Error::from(e).context("read from the terminal")),
    }
}

/// How it is shown.
struct View {
    /// 0 is the name, and then the columns.
    sorted_by: usize,
    /// The largest first; names from the first letter on.
    largest_first: bool,
    /// The first volume that is shown.
    first: usize,
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

    fn sort(&self, rows: &mut [Shown]) {
        rows.sort_by(|a, b| {
            let by_name = a.name.cmp(&b.name);
            let order = match self.sorted_by.checked_sub(1).and_then(|column| COLUMNS.get(column)) {
                None => by_name.reverse(),
                Some(column) => {
                    // What does not answer is looked at first.
                    let value = |row: &Shown| row.rates.as_ref().map_or(f64::INFINITY, column.by);
                    value(a).partial_cmp(&value(b)).unwrap_or(Ordering::Equal).then(by_name.reverse())
                }
            };
            if self.largest_first { order.reverse() } else { order }
        });
    }

    fn draw(&mut self, frame: &mut Frame<'_>, found: Option<&mut Result<Vec<Shown>>>) {
        let lines = Layout::vertical([Constraint::Length(1), Constraint::Length(1), Constraint::Fill(1)]);
        let [top, _, below] = lines.areas(frame.area());
        match found {
            None => frame.render_widget(Line::from("asking …"), top),
            Some(Err(e)) => frame.render_widget(Line::from(printable::line(&e.to_string())), top),
            Some(Ok(rows)) => {
                self.sort(rows);
                let fit = usize::from(below.height).saturating_sub(1).max(1);
                self.first = self.first.min(rows.len().saturating_sub(fit));
                let title = Line::styled(title(rows), Style::new().add_modifier(Modifier::BOLD));
                frame.render_widget(title, top);
                frame.render_widget(self.table(rows, below.width), below);
            }
        }
    }

    /// As many columns as fit.
    fn table(&self, rows: &[Shown], width: u16) -> Table<'static> {
        let cells: Vec<Vec<String>> = rows.iter().map(cells).collect();
        let widths = fitting(&cells, width);
        let heads = std::iter::once("VOLUME").chain(COLUMNS.iter().map(|column| column.head));
        let head = heads.enumerate().take(widths.len()).map(|(n, head)| match n == self.sorted_by {
            // The whole width of the column is marked.
            true => Cell::from(aligned(n, head.into())).style(Style::new().add_modifier(Modifier::REVERSED)),
            false => Cell::from(aligned(n, head.into())),
        });
        let rows = cells.into_iter().skip(self.first).map(|cells| {
            let silent = cells.len() == 2;
            Row::new(cells.into_iter().enumerate().take(widths.len()).map(move |(n, cell)| {
                match silent && n > 0 {
                    true => Cell::from(cell).column_span(COLUMNS.len() as u16),
                    false => Cell::from(aligned(n, cell)),
                }
            }))
        });
        let constraints = widths.iter().map(|width| Constraint::Length(*width)).collect::<Vec<_>>();
        let head = Row::new(head.collect::<Vec<_>>());
        Table::new(rows.collect::<Vec<_>>(), constraints).header(head).column_spacing(GAP)
    }
}

/// The cells of a volume: its name and its numbers, or its name and that it does not answer.
fn cells(row: &Shown) -> Vec<String> {
    let mut cells = vec![row.name.clone()];
    match &row.rates {
        Some(rates) => cells.extend(COLUMNS.iter().map(|column| (column.show)(rates))),
        None => cells.push(SILENT.into()),
    }
    cells
}

/// The widths of those columns that fit into `width`, from the left. The name is always there.
fn fitting(rows: &[Vec<String>], width: u16) -> Vec<u16> {
    let heads = std::iter::once("VOLUME").chain(COLUMNS.iter().map(|column| column.head));
    let wide = |(n, head): (usize, &'static str)| {
        // "does not answer" goes over several columns.
        let cells = rows.iter().filter(|cells| n == 0 || cells.len() > 2).filter_map(|cells| cells.get(n));
        let widest = cells.map(|cell| Line::raw(cell).width()).max().unwrap_or(0).max(head.len());
        u16::try_from(widest).unwrap_or(u16::MAX)
    };
    let mut left = width;
    let mut widths = Vec::new();
    for width in heads.enumerate().map(wide) {
        let gap = if widths.is_empty() { 0 } else { GAP };
        match left.checked_sub(width.saturating_add(gap)) {
            Some(rest) => left = rest,
            None if widths.is_empty() => left = 0,
            None => break,
        }
        widths.push(width);
    }
    widths
}

/// A name is to the left, and numbers are to the right.
fn aligned(column: usize, cell: String) -> Line<'static> {
    match column {
        0 => Line::from(cell),
        _ => Line::from(cell).alignment(Alignment::Right),
    }
}

/// What all volumes do together.
fn title(rows: &[Shown]) -> String {
    let answering = || rows.iter().filter_map(|row| row.rates.as_ref());
    let sum = |of: fn(&Rates) -> f64| answering().map(of).sum::<f64>();
    format!(
        "sealblk top: {}, {:.0} requests/s, {}/s read, {}/s written; {} errors  (arrows sort, r reverses, q \
         quits)",
        match rows.len() {
            1 => "1 volume attached".into(),
            n => format!("{n} volumes attached"),
        },
        sum(|it| it.read.per_second + it.write.per_second),
        bytes(sum(|it| it.read.bytes_per_second)),
        bytes(sum(|it| it.write.bytes_per_second)),
        answering().map(|it| it.errors).sum::<u64>(),
    )
}

/// The terminal, while it is used so. It is put back at the end, however that comes.
struct Screen(DefaultTerminal);

impl Screen {
    fn enter() -> Result<Self> {
        ratatui::try_init().map(Screen).context(|| "set the terminal")
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Where there is no terminal any more, nothing is to be put back.
        let _ = self.0.show_cursor();
        let _ = ratatui::try_restore();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn volume(name: &str, writes: Option<u64>) -> Shown {
        let rates = writes.map(|writes| {
            let mut rates = Rates::between(None, &Stats { since_ns: 1_000_000_000, ..Stats::default() });
            rates.write.per_second = writes as f64;
            rates
        });
        Shown { name: name.into(), rates }
    }

    fn lines(view: &mut View, rows: Vec<Shown>, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame, Some(&mut Ok(rows)))).unwrap();
        let shown = terminal.backend().to_string();
        let lines = shown.lines().map(|line| line.trim_matches('"').trim_end().to_owned());
        lines.collect()
    }

    #[test]
    fn volumes_are_sorted_by_the_chosen_column_and_who_does_not_answer_comes_first() {
        let mut view = View { sorted_by: 2, largest_first: true, first: 0 };
        let rows = || vec![volume("few", Some(3)), volume("gone", None), volume("many", Some(4000))];
        let shown = lines(&mut view, rows(), 120, 6);
        assert!(shown[0].starts_with("sealblk top: 3 volumes attached, 4003 requests/s, "), "{shown:?}");
        assert_eq!(shown[2].split_whitespace().take(3).collect::<Vec<_>>(), ["VOLUME", "r/s", "w/s"]);
        let names = |shown: &[String]| -> Vec<String> {
            shown[3..].iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
        };
        assert_eq!(
            (names(&shown), shown[3].ends_with(SILENT)),
            (["gone", "many", "few"].map(String::from).to_vec(), true)
        );
        assert!(view.press(b"r"));
        assert_eq!(names(&lines(&mut view, rows(), 120, 6)), ["few", "many", "gone"]);
        // From w/s over r/s to the name.
        assert!(view.press(b"\x1b[D\x1b[D"));
        assert_eq!(names(&lines(&mut view, rows(), 120, 6)), ["many", "gone", "few"]);
        assert!(view.press(b"\x1b[D") && view.sorted_by == COLUMNS.len());
        assert!(view.press(b"\x1b[C") && view.sorted_by == 0);
        for end in [&b"q"[..], b"xq", b"\x03", b"\x04"] {
            assert!(!view.press(end));
        }
    }

    #[test]
    fn columns_that_do_not_fit_are_left_out_whole_and_volumes_that_do_not_fit_are_moved_through() {
        let mut view = View { sorted_by: 0, largest_first: true, first: 0 };
        let rows = || (0..9).map(|n| volume(&format!("v{n}"), Some(n))).collect::<Vec<_>>();
        let shown = lines(&mut view, rows(), 19, 5);
        assert_eq!(shown[2..], ["VOLUME  r/s  w/s", "v0        0    0", "v1        0    1"]);
        assert!(view.press(b"\x1b[B\x1bOB"));
        assert_eq!(lines(&mut view, rows(), 19, 5)[3], "v2        0    2");
        assert!(view.press(&b"\x1b[B".repeat(100)));
        assert_eq!(lines(&mut view, rows(), 19, 5)[4], "v8        0    8");
        assert!(view.press(b"\x1b[A"));
        assert_eq!(lines(&mut view, rows(), 19, 5)[4], "v7        0    7");
        // However small the terminal is.
        for (width, height) in [(1, 1), (3, 2), (200, 1), (1, 50)] {
            lines(&mut view, rows(), width, height);
        }
    }
}
