//! The receipt of `volume delete --shred`: what was destroyed, and what is outside its reach.
#![forbid(unsafe_code)]

use crate::base::Result;
use crate::cli::{Env, output};
use crate::ops::shred::Receipt;
use serde_json::json;

/// Prints it.
pub(super) fn print(env: &Env, receipt: &Receipt) -> Result<()> {
    if env.json {
        let mut value = json!(receipt);
        value["state"] = "deleted".into();
        value["outside"] = receipt.outside().into();
        return output::print_json(&value);
    }
    output::print(&text(receipt)).map(drop)
}

fn text(receipt: &Receipt) -> String {
    let mut text = format!("{} deleted and shredded at {}\n\nDestroyed:\n", receipt.volume, receipt.time);
    for copy in &receipt.destroyed {
        text += &format!("  {}: {} bytes overwritten, synced, removed\n", copy.path.display(), copy.bytes);
    }
    if receipt.wrapped_by.is_empty() {
        text +=
            "  no wrapped data key: the volume was not encrypted, and its data may be read from the medium\n";
    }
    text += "\nRemoved, not overwritten:\n";
    for layer in &receipt.layers {
        text += &format!("  {}\n", layer.display());
    }
    text += "\nOutside the reach of this:\n";
    for what in receipt.outside() {
        text += &format!("  {what}\n");
    }
    text
}
