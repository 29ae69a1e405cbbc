//! Metrics as text, in the form of OpenMetrics 1.0 or in Prometheus's own older one (0.0.4), which differ in
//! few places: how a counter's family is called, what information is, and whether an end is marked.
#![forbid(unsafe_code)]

use std::fmt::{Display, Write};

/// Which of the two forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus's text format 0.0.4.
    Prometheus,
}

impl Form {
    /// What HTTP calls it.
    pub fn content_type(self) -> &'static str {
        match self {
            Form::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Form::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// The form that a client wants who sends this `Accept`.
    pub fn wanted(accept: &str) -> Self {
        // With "q=0" one refuses what one names; nobody does that to the form.
        match accept.contains("application/openmetrics-text") {
            true => Form::OpenMetrics,
            false => Form::Prometheus,
        }
    }
}

/// What a family's samples are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Gauge,
    /// Its name has no `_total`.
    Counter,
    Histogram,
    /// Its name has no `_info`.
    Info,
}

/// A text that grows, family by family.
pub(super) struct Text {
    form: Form,
    text: String,
    name: &'static str,
    of: Type,
}

/// A sample's labels.
pub(super) type Labels<'a> = [(&'a str, &'a str)];

impl Text {
    pub(super) fn new(form: Form) -> Self {
        Text { form, text: String::new(), name: "", of: Type::Gauge }
    }

    /// Begins a family. What it is for is a sentence in plain words.
    pub(super) fn family(&mut self, name: &'static str, of: Type, help: &str) {
        (self.name, self.of) = (name, of);
        let (shown, kind) = match (self.form, of) {
            (_, Type::Gauge) => (name.to_string(), "gauge"),
            (_, Type::Histogram) => (name.to_string(), "histogram"),
            (Form::OpenMetrics, Type::Counter) => (name.to_string(), "counter"),
            (Form::Prometheus, Type::Counter) => (format!("{name}_total"), "counter"),
            (Form::OpenMetrics, Type::Info) => (name.to_string(), "info"),
            (Form::Prometheus, Type::Info) => (format!("{name}_info"), "gauge"),
        };
        self.line(format_args!("# HELP {shown} {help}"));
        self.line(format_args!("# TYPE {shown} {kind}"));
    }

    /// A sample of the family that was begun last.
    pub(super) fn sample(&mut self, labels: &Labels<'_>, value: impl Display) {
        let end = match self.of {
            Type::Counter => "_total",
            Type::Info => "_info",
            Type::Gauge | Type::Histogram => "",
        };
        self.write(end, labels, None, value);
    }

    /// A histogram's samples: how many values there are up to each bound, in all, and their sum.
    pub(super) fn histogram(
        &mut self,
        labels: &Labels<'_>,
        below: impl Iterator<Item = (f64, u64)>,
        count: u64,
        sum: f64,
    ) {
        for (bound, count) in below {
            self.write("_bucket", labels, Some(&number(bound)), count);
        }
        self.write("_bucket", labels, Some("+Inf"), count);
        self.write("_sum", labels, None, number(sum));
        self.write("_count", labels, None, count);
    }

    /// The whole text.
    pub(super) fn end(mut self) -> String {
        if self.form == Form::OpenMetrics {
            self.line(format_args!("# EOF"));
        }
        self.text
    }

    fn write(&mut self, end: &str, labels: &Labels<'_>, bound: Option<&str>, value: impl Display) {
        let mut all = String::new();
        for (name, value) in labels.iter().copied().chain(bound.map(|bound| ("le", bound))) {
            let comma = if all.is_empty() { "" } else { "," };
            // Writing into a text cannot fail.
            let _ = write!(all, "{comma}{name}=\"{}\"", escaped(value));
        }
        let name = self.name;
        match all.is_empty() {
            true => self.line(format_args!("{name}{end} {value}")),
            false => self.line(format_args!("{name}{end}{{{all}}} {value}")),
        }
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.text, "{line}");
    }
}

/// A number that OpenMetrics takes for a floating point one.
pub(super) fn number(n: f64) -> String {
    format!("{n:?}")
}

/// A label's value: what would end it, or the line, is written otherwise; other control characters are left
/// out.
fn escaped(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for c in value.chars() {
        match c {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            c if c.is_control() => {}
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(form: Form) -> String {
        let mut text = Text::new(form);
        text.family("a_build", Type::Info, "What it is.");
        text.sample(&[("version", "1")], 1);
        text.family("a_read_bytes", Type::Counter, "Bytes read.");
        text.sample(&[("name", "a \"b\"\\\n\x1b")], 7);
        text.family("a_duration_seconds", Type::Histogram, "How long.");
        text.histogram(&[], [(0.001, 1), (1.0, 2)].into_iter(), 3, 2.5);
        text.end()
    }

    #[test]
    fn both_forms_say_the_same_by_their_own_rules() {
        let rest = "\
# HELP a_duration_seconds How long.
# TYPE a_duration_seconds histogram
a_duration_seconds_bucket{le=\"0.001\"} 1
a_duration_seconds_bucket{le=\"1.0\"} 2
a_duration_seconds_bucket{le=\"+Inf\"} 3
a_duration_seconds_sum 2.5
a_duration_seconds_count 3
";
        let sample = "a_read_bytes_total{name=\"a \\\"b\\\"\\\\\\n\"} 7\n";
        let open = "\
# HELP a_build What it is.
# TYPE a_build info
a_build_info{version=\"1\"} 1
# HELP a_read_bytes Bytes read.
# TYPE a_read_bytes counter
";
        let old = "\
# HELP a_build_info What it is.
# TYPE a_build_info gauge
a_build_info{version=\"1\"} 1
# HELP a_read_bytes_total Bytes read.
# TYPE a_read_bytes_total counter
";
        assert_eq!(some(Form::OpenMetrics), format!("{open}{sample}{rest}# EOF\n"));
        assert_eq!(some(Form::Prometheus), format!("{old}{sample}{rest}"));
    }

    #[test]
    fn a_client_gets_the_form_that_it_asks_for() {
        let prometheus =
            "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        assert_eq!(Form::wanted(prometheus), Form::OpenMetrics);
        assert_eq!(Form::wanted("*/*"), Form::Prometheus);
    }
}
