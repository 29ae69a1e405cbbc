//! `sealblk volume modify` and `rename`.
#![forbid(unsafe_code)]

use super::show::{description, kept_words};
use crate::base::{Error, Kind, Result, size};
use crate::catalog::attach_settings::AttachSettings;
use crate::catalog::metadata::VolumeName;
use crate::cli::attach::{LimitArgs, queues, serial};
use crate::cli::filter::{self, Tag};
use crate::cli::{Env, output};
use crate::ops::{modify, rename};
use clap::ValueEnum;

/// What `volume modify` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume modify db --iops 3000 --throughput 125MiB
  sealblk volume modify db --serial db-01 --queues 4 --tag env=prod
  sealblk volume modify db --reset iops --reset throughput

It is kept with the volume: each attach takes it, unless its own arguments say otherwise. Other limits take force
at once if the volume is attached, and stay when it is attached again. \"sealblk throttle\" sets limits that
last until the volume is detached. Another serial, and another number of queues, are seen at the next attach.")]
pub struct ModifyArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    #[command(flatten)]
    limits: LimitArgs,
    /// The disk's serial as the guest sees it, at most 20 bytes.
    #[arg(long, value_name = "S", value_parser = serial)]
    serial: Option<String>,
    /// Queues that the guest may use, 1 to 64.
    #[arg(long, value_name = "N", value_parser = queues())]
    queues: Option<u16>,
    /// Keep nothing of this any more, so that each attach has its own default; may be given several times.
    #[arg(long, value_enum, value_name = "WHAT")]
    reset: Vec<What>,
    /// A tag that it gets; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    tag: Vec<Tag>,
    /// The key of a tag that it loses; may be given several times.
    #[arg(long, value_name = "KEY")]
    untag: Vec<String>,
}

/// What can be kept with a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    Iops,
    Throughput,
    Burst,
    Serial,
    Queues,
}

/// What `volume rename` takes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  sealblk volume rename db db-old
  sealblk volume rename db --unnamed

Its id stays, and so does everything that names it by that: snapshots, tags, sockets. It may be attached.")]
pub struct RenameArgs {
    /// The volume: its id, the first digits of its id, or its name.
    volume: String,
    /// Its new name, which no other volume has.
    #[arg(required_unless_present = "unnamed", conflicts_with = "unnamed")]
    name: Option<VolumeName>,
    /// Take its name away.
    #[arg(long)]
    unnamed: bool,
}

impl ModifyArgs {
    fn is_of_attach(&self) -> bool {
        self.limits.is_any() || self.serial.is_some() || self.queues.is_some() || !self.reset.is_empty()
    }

    fn change(&self, kept: &mut AttachSettings) {
        for what in &self.reset {
            match what {
                What::Iops => kept.iops = None,
                What::Throughput => kept.throughput = None,
                What::Burst => kept.burst_ms = None,
                What::Serial => kept.serial = None,
                What::Queues => kept.queues = None,
            }
        }
        self.limits.change(kept);
        if self.serial.is_some() {
            kept.serial.clone_from(&self.serial);
        }
        kept.queues = self.queues.or(kept.queues);
    }
}

/// Changes what is kept with a volume, and its tags.
pub(super) fn modify(env: &Env, args: &ModifyArgs) -> Result<()> {
    let is_of_tags = !args.tag.is_empty() || !args.untag.is_empty();
    if !args.is_of_attach() && !is_of_tags {
        let message = "say what is to be changed: limits, --serial, --queues, --reset, --tag or --untag";
        return Err(Error::new(Kind::Usage, message));
    }
    let (store, catalog) = (env.store()?, env.catalog());
    let id = catalog.resolve(&args.volume)?;
    if is_of_tags {
        catalog.change_tags(id, |tags| {
            filter::remove(tags, &args.untag)?;
            filter::set(tags, &args.tag)
        })?;
    }
    let modified = match args.is_of_attach() {
        false => None,
        true => Some(modify::modify(&store, id, |kept| {
            args.change(kept);
            Ok(())
        })?),
    };
    if env.json {
        let mut value = description(&catalog, &catalog.load(id)?)?;
        value["in_force"] = modified.as_ref().is_some_and(|it| it.in_force).into();
        return output::print_json(&value);
    }
    let words = kept_words(&catalog.attach_settings(id)?);
    output::print(&format!("{id}: {words}\n"))?;
    if let Some(modified) = modified {
        if modified.in_force {
            output::tell("the limits are in force");
        }
        if modified.at_next_attach {
            output::tell("the guest sees the serial and the queues when the volume is attached again");
        }
    }
    Ok(())
}

/// Gives a volume another name.
pub(super) fn rename(env: &Env, args: &RenameArgs) -> Result<()> {
    let id = env.catalog().resolve(&args.volume)?;
    let renamed = rename::rename(&env.store()?, id, args.name.clone())?;
    match (env.json, renamed.name()) {
        (true, _) => output::print_json(&description(&env.catalog(), &renamed)?),
        (false, Some(name)) => output::print(&format!("{id} is called {name}\n")).map(drop),
        (false, None) => output::print(&format!("{id} has no name\n")).map(drop),
    }
}

/// Limits in words; none where there are none.
pub(super) fn limit_words(iops: u64, throughput: u64) -> Option<String> {
    let mut words = Vec::new();
    if iops > 0 {
        words.push(format!("{iops} requests/s"));
    }
    if throughput > 0 {
        words.push(format!("{}/s", size::human(throughput)));
    }
    (!words.is_empty()).then(|| words.join(", "))
}
