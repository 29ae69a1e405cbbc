//! Data of a frozen layer moves to the layer below it, which a command does: the host process takes part in
//! it with what it knows of the layers.
//!
//! | client | host process |
//! |---|---|
//! | has copied the data; `move-down`, with the layers and the bytes | notes in its layer map that the lower layer may have them; lets go of its image locks on the two; answers `moving` |
//! | locks the two, so that nobody else reads them; takes the data out of the upper one; `moved` | locks them again; answers `moved` |

use crate::base::{Error, Kind, Result, wire};
use crate::catalog::{Catalog, LayerId, VolumeId};
use crate::host::control::{Answer, Request, connect, exchange, receive};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long the host process may take for a step: longer than it waits itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// What moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveDown {
    /// From here.
    pub upper: LayerId,
    /// To here, the next layer below that holds something.
    pub lower: LayerId,
    /// In which bytes.
    pub start: u64,
    /// Where they end.
    pub end: u64,
}

/// The client's side of one move, of which the host process knows. Dropped, the host process goes on as if
/// the data had been moved, which does no harm.
pub struct Moving {
    client: UnixStream,
}

impl Moving {
    /// Tells the host process of an attached volume that data moves in these bytes. When this returns, it
    /// finds them in either layer, and keeps nobody off the two.
    ///
    /// # Errors
    /// `Busy` if its layers are changing; `Unsupported` for a host process of an earlier version;
    /// those of the connection.
    pub fn tell(
        catalog: &Catalog,
        volume: VolumeId,
        upper: LayerId,
        lower: LayerId,
        bytes: Range<u64>,
    ) -> Result<Self> {
        let client = connect(catalog, volume, PATIENCE)?;
        client.set_read_timeout(Some(PATIENCE))?;
        let request = Request::MoveDown(MoveDown { upper, lower, start: bytes.start, end: bytes.end });
        match exchange(&client, &request)? {
            Answer::Moving => Ok(Moving { client }),
            _ => Err(Error::new(Kind::Other, "the host process's answer is to another question")),
        }
    }

    /// Tells it that the move is over.
    ///
    /// # Errors
    /// Those of the connection, and of the image locks: it serves the layers all the same.
    pub fn end(self) -> Result<()> {
        wire::say(&self.client, &super::conversation::Step::Moved {})?;
        receive(&self.client).map(drop)
    }
}
