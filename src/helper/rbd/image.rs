//! An RBD image that is open, by librbd: what may be asked of it, and no pointer.

use super::library::{self, Done, Handle, Library, Watcher};
use crate::backing::nbd;
use crate::base::{Context, Error, Kind, Result};
use nix::errno::Errno;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ops::Range;
use std::ptr::{null, null_mut};

/// Features that an image is made with: exclusive-lock, object-map, fast-diff.
const FEATURES: u64 = EXCLUSIVE_LOCK | 1 << 3 | 1 << 4;
const EXCLUSIVE_LOCK: u64 = 1 << 2;
/// `RBD_LOCK_MODE_EXCLUSIVE`.
const EXCLUSIVE: c_uint = 0;
/// `RBD_WRITE_ZEROES_FLAG_THICK_PROVISION`.
const KEEP_SPACE: c_int = 1;
/// The longest value of an image's metadata that is read.
const VALUE_MAX: usize = 4096;
/// Seconds that a client is refused for which has lost an image: Ceph's own hour could be over before a host
/// that was cut off comes back.
const REFUSED: u32 = 30 * 24 * 3600;
/// Seconds after which an operation fails that Ceph has not answered, unless its settings say another time.
const OPERATION: &str = "120";

/// An image. Functions that take it may be called from any thread, and at one time.
pub(super) struct Image {
    library: &'static Library,
    cluster: Handle,
    handle: Handle,
    /// The address of this client, as Ceph shows it to others.
    address: String,
    size: u64,
}

// SAFETY: librbd's functions on an image may be called from all threads at one time; the address and size do
// not change.
unsafe impl Send for Image {}
// SAFETY: as above.
unsafe impl Sync for Image {}

/// What ends an operation.
pub(super) trait Ends {
    /// The result of the operation: a negative one is the number of an error.
    fn ended(self: Box<Self>, result: i64);

    /// The bytes to be filled or stored.
    fn bytes(&mut self) -> &mut [u8];
}

/// An operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read { offset: u64 },
    Write { offset: u64 },
    Zero { offset: u64, len: u64, keep_space: bool },
    Flush,
}

/// A cluster that is connected to, and a pool there.
pub(super) struct Pool {
    pub(super) library: &'static Library,
    pub(super) cluster: Handle,
    pub(super) context: Handle,
    pub(super) address: String,
}

impl Pool {
    /// Connects to the cluster of an image, as its address says.
    ///
    /// # Errors
    /// What is in the way, in words for whoever looks after Ceph.
    pub(super) fn connect(image: &nbd::Image) -> Result<Pool> {
        let library = library::load()?;
        let mut cluster = null_mut();
        let name = c_string(&format!("client.{}", image.id()))?;
        // SAFETY: the texts are C strings that live until the call returns, and `cluster` takes a pointer.
        let made = unsafe { (library.rados_create2)(&mut cluster, c"ceph".as_ptr(), name.as_ptr(), 0) };
        check(made).context(|| "prepare librados")?;
        let conf = image.conf();
        let path = c_string(&conf.display().to_string())?;
        // SAFETY: `cluster` was made above, and the path is a C string.
        check(unsafe { (library.rados_conf_read_file)(cluster, path.as_ptr()) })
            .context(|| format!("read the settings of Ceph, {}", conf.display()))?;
        settle(library, cluster, image)?;
        // SAFETY: as above.
        check(unsafe { (library.rados_connect)(cluster) }).map_err(|e| not_connected(&e, image))?;
        let mut text = null_mut();
        // SAFETY: `cluster` is connected, and `text` takes a pointer.
        check(unsafe { (library.rados_getaddrs)(cluster, &mut text) })
            .context(|| "ask for the address here")?;
        // SAFETY: the call has made a C string, which is copied before it is given back.
        let address = unsafe {
            let address = CStr::from_ptr(text).to_string_lossy().into_owned();
            (library.rados_buffer_free)(text);
            address
        };
        let mut context = null_mut();
        let pool = c_string(image.pool())?;
        // SAFETY: as above.
        check(unsafe { (library.rados_ioctx_create)(cluster, pool.as_ptr(), &mut context) })
            .map_err(|e| explained(&e, &format!("the pool {}", image.pool()), image))?;
        let namespace = c_string(image.namespace())?;
        // SAFETY: `context` was made above, and the text is a C string. Where the pool is full, writes fail
        // with the full-try flag, and do not wait without end.
        unsafe {
            (library.rados_ioctx_set_namespace)(context, namespace.as_ptr());
            (library.rados_set_pool_full_try)(context);
        }
        Ok(Pool { library, cluster, context, address })
    }

    /// The address of this client, as Ceph shows it to others.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Opens an image.
    ///
    /// # Errors
    /// What is in the way, in words for whoever looks after Ceph.
    pub(super) fn open(self, image: &nbd::Image, write: bool, make: Option<u64>) -> Result<Image> {
        let shown = format!("the image {}", image.shown());
        let handle = match (self.handle(image, write), make) {
            (Err(Errno::ENOENT), Some(len)) => {
                self.make(image, len).map_err(|e| explained(&e, &shown, image))?;
                self.handle(image, write)
            }
            (handle, _) => handle,
        };
        let handle = handle.map_err(|e| explained(&e.into(), &shown, image))?;
        let Pool { library, cluster, address, .. } = self;
        let (mut size, mut features) = (0, 0);
        // SAFETY: the image is open, and the numbers have room.
        check(unsafe { (library.rbd_get_size)(handle, &mut size) }).context(|| "ask for the image's size")?;
        // SAFETY: as above.
        check(unsafe { (library.rbd_get_features)(handle, &mut features) })
            .context(|| "ask what the image is")?;
        if write && features & EXCLUSIVE_LOCK == 0 {
            let message = format!(
                "{shown} has no exclusive lock, by which other hosts are kept away; \"rbd feature enable {} \
                 exclusive-lock object-map fast-diff\" gives it one",
                image.shown()
            );
            return Err(Error::new(Kind::Usage, message));
        }
        Ok(Image { library, cluster, handle, address, size })
    }

    fn handle(&self, image: &nbd::Image, write: bool) -> std::result::Result<Handle, Errno> {
        let name = CString::new(image.name()).map_err(|_| Errno::EINVAL)?;
        let open = if write { self.library.rbd_open } else { self.library.rbd_open_read_only };
        let mut handle = null_mut();
        // SAFETY: `context` is one of this pool, and the name is a C string; `handle` takes a pointer.
        match unsafe { open(self.context, name.as_ptr(), &mut handle, null()) } {
            0.. => Ok(handle),
            error => Err(Errno::from_raw(-error)),
        }
    }

    fn make(&self, image: &nbd::Image, len: u64) -> std::result::Result<(), std::io::Error> {
        let name = CString::new(image.name()).map_err(std::io::Error::other)?;
        let mut order = 0;
        // SAFETY: as above; an order of 0 asks for the usual one, and is replaced.
        check(unsafe { (self.library.rbd_create2)(self.context, name.as_ptr(), len, FEATURES, &mut order) })
    }
}

/// What is set, whatever the settings of the cluster say.
fn settle(library: &Library, cluster: Handle, image: &nbd::Image) -> Result<()> {
    let keyring = image.keyring();
    let set = |name: &str, value: &str| -> Result<()> {
        let attempt = || format!("set {name} of librados");
        let (name, value) = (c_string(name)?, c_string(value)?);
        // SAFETY: `cluster` is one that was made and not connected yet, and the texts are C strings.
        check(unsafe { (library.rados_conf_set)(cluster, name.as_ptr(), value.as_ptr()) }).context(attempt)
    };
    let mut room = [0 as c_char; 32];
    // SAFETY: the name is a C string, and `room` has as many bytes as is said.
    let got = unsafe {
        (library.rados_conf_get)(cluster, c"rados_osd_op_timeout".as_ptr(), room.as_mut_ptr(), room.len())
    };
    // SAFETY: what the call has written ends with a zero byte; if it wrote nothing, the first one is.
    let said = unsafe { CStr::from_ptr(room.as_ptr()) }.to_string_lossy();
    let is_said = got >= 0 && said.parse::<f64>().is_ok_and(|seconds| seconds > 0.0);
    if !is_said {
        set("rados_osd_op_timeout", OPERATION)?;
    }
    set("keyring", &keyring.display().to_string())?;
    for (name, value) in [
        ("rados_mon_op_timeout", "15"),
        ("client_mount_timeout", "10"),
        // A write that completes is durable then, and nothing lies here that could come too late.
        ("rbd_cache", "false"),
        ("rbd_skip_partial_discard", "false"),
        ("rbd_blocklist_on_break_lock", "true"),
        // No file and no socket is made.
        ("log_file", ""),
        ("admin_socket", ""),
        ("log_to_stderr", "false"),
        ("err_to_stderr", "false"),
        ("log_to_syslog", "false"),
    ] {
        set(name, value)?;
    }
    Ok(())
}

impl Image {
    /// How long it is, in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The address of this client, as Ceph shows it to others.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// Begins an operation; `request` is told how it ends, on a thread of librbd's. All bytes of `request`
    /// are moved.
    pub(super) fn begin<R: Ends + Send + 'static>(&self, operation: Operation, request: Box<R>) {
        let request = Box::into_raw(request);
        let mut completion = null_mut();
        let done: Done = ended::<R>;
        // SAFETY: `request` is a box that nobody else has; `ended` makes a box of it again, once.
        let made = unsafe { (self.library.rbd_aio_create_completion)(request.cast(), done, &mut completion) };
        if made < 0 {
            // SAFETY: as above; no completion was made that could do it.
            return unsafe { Box::from_raw(request) }.ended(made.into());
        }
        // SAFETY: `request` lives until `ended`, and until then nobody but librbd looks at its bytes.
        let bytes = unsafe { (*request).bytes() };
        let (data, len) = (bytes.as_mut_ptr().cast::<c_char>(), bytes.len());
        let Image { library, handle, .. } = self;
        // SAFETY: the image is open; `data` has `len` bytes, which stay where they are until `ended`.
        let begun = unsafe {
            match operation {
                Operation::Read { offset } => (library.rbd_aio_read)(*handle, offset, len, data, completion),
                Operation::Write { offset } => {
                    (library.rbd_aio_write)(*handle, offset, len, data, completion)
                }
                Operation::Zero { offset, len, keep_space } => {
                    let flags = if keep_space { KEEP_SPACE } else { 0 };
                    (library.rbd_aio_write_zeroes)(*handle, offset, len as usize, completion, flags, 0)
                }
                Operation::Flush => (library.rbd_aio_flush)(*handle, completion),
            }
        };
        if begun < 0 {
            // SAFETY: an operation that has not begun does not end, so both are still ours alone.
            let request = unsafe {
                (library.rbd_aio_release)(completion);
                Box::from_raw(request)
            };
            request.ended(begun.into());
        }
    }

    /// Runs of these bytes that may hold something, in their order; outside of them is nothing.
    pub(super) fn runs(&self, bytes: Range<u64>) -> std::io::Result<Vec<Range<u64>>> {
        unsafe extern "C" fn take(offset: u64, len: usize, exists: c_int, runs: *mut c_void) -> c_int {
            // SAFETY: `runs` is what was given to the call that calls this, and nobody else has it meanwhile.
            let runs = unsafe { &mut *runs.cast::<Vec<Range<u64>>>() };
            if exists != 0 {
                runs.push(offset..offset.saturating_add(len as u64));
            }
            0
        }
        let mut runs: Vec<Range<u64>> = Vec::new();
        let (offset, len) = (bytes.start, bytes.end - bytes.start);
        let Image { library, handle, .. } = self;
        // SAFETY: the image is open, and `runs` lives until the call returns, which then
        // calls nobody any more.
        check(unsafe {
            (library.rbd_diff_iterate2)(*handle, null(), offset, len, 1, 1, take, (&raw mut runs).cast())
        })?;
        Ok(runs)
    }

    /// The address of the client that has the exclusive lock.
    pub(super) fn owner(&self) -> std::io::Result<Option<String>> {
        let (mut mode, mut owners, mut count) = (0, [null_mut(); 8], 8);
        let Image { library, handle, .. } = self;
        // SAFETY: the image is open, and `owners` has room for `count` texts.
        let got =
            unsafe { (library.rbd_lock_get_owners)(*handle, &mut mode, owners.as_mut_ptr(), &mut count) };
        if got == -libc::ENOENT {
            return Ok(None);
        }
        check(got)?;
        let count = count.min(owners.len());
        // SAFETY: the call has put `count` C strings there, which are copied before they are given back.
        unsafe {
            let first = owners[..count].first();
            let first = first.map(|text| CStr::from_ptr(*text).to_string_lossy().into_owned());
            (library.rbd_lock_get_owners_cleanup)(owners.as_mut_ptr(), count);
            Ok(first)
        }
    }

    /// Whether the client of this address still gives signs of life: Ceph forgets it 30
    /// seconds after the last.
    pub(super) fn is_watched_by(&self, address: &str) -> std::io::Result<bool> {
        let none = Watcher { address: null_mut(), id: 0, cookie: 0 };
        let mut room = vec![none; 16];
        let Image { library, handle, .. } = self;
        loop {
            let mut count = room.len();
            // SAFETY: the image is open, and `room` has room for `count`.
            let got = unsafe { (library.rbd_watchers_list)(*handle, room.as_mut_ptr(), &mut count) };
            if got == -libc::ERANGE && count > room.len() && count < 1 << 16 {
                room.resize(count, none);
                continue;
            }
            check(got)?;
            let count = count.min(room.len());
            // SAFETY: the call has filled `count` of them with C strings, which are not used
            // once they are given back.
            return unsafe {
                let is_it =
                    |watcher: &Watcher| CStr::from_ptr(watcher.address).to_bytes() == address.as_bytes();
                let found = room[..count].iter().any(is_it);
                (library.rbd_watchers_list_cleanup)(room.as_mut_ptr(), count);
                Ok(found)
            };
        }
    }

    /// Takes the exclusive lock, and keeps it until it is released: others that want it are refused.
    ///
    /// # Errors
    /// `EROFS`, `EBUSY` or `EAGAIN` where another client has it.
    pub(super) fn lock(&self) -> std::io::Result<()> {
        // SAFETY: the image is open.
        check(unsafe { (self.library.rbd_lock_acquire)(self.handle, EXCLUSIVE) })
    }

    /// Whether this client has the lock, which Ceph is asked for.
    pub(super) fn has_lock(&self) -> std::io::Result<bool> {
        let mut has = 0;
        // SAFETY: the image is open, and the number has room.
        check(unsafe { (self.library.rbd_is_exclusive_lock_owner)(self.handle, &mut has) })?;
        Ok(has != 0)
    }

    /// Takes the lock from the client of this address, of whom Ceph takes nothing any more from then on.
    pub(super) fn break_lock(&self, address: &str) -> std::io::Result<()> {
        let address = CString::new(address).map_err(std::io::Error::other)?;
        // SAFETY: the image is open, and the address is a C string.
        check(unsafe { (self.library.rbd_lock_break)(self.handle, EXCLUSIVE, address.as_ptr()) })
    }

    /// Puts the client of this address on the cluster's blocklist: Ceph takes nothing any more of it, from
    /// all that is asked here from now on.
    ///
    /// librbd has a setting for the time, which Ceph 16 does not take.
    pub(super) fn refuse(&self, address: &str) -> std::io::Result<()> {
        let command = serde_json::json!({
            "prefix": "osd blocklist", "blocklistop": "add", "addr": address, "expire": f64::from(REFUSED),
        });
        let command = CString::new(command.to_string()).map_err(std::io::Error::other)?;
        let mut commands = [command.as_ptr()];
        let (library, cluster) = (self.library, self.cluster);
        // SAFETY: the cluster is connected; there is one command, a C string; no input is
        // given, and no answer wanted.
        check(unsafe {
            (library.rados_mon_command)(
                cluster,
                commands.as_mut_ptr(),
                commands.len(),
                null(),
                0,
                null_mut(),
                null_mut(),
                null_mut(),
                null_mut(),
            )
        })?;
        // What is asked of an OSD with this map, the OSD does not do before it has the map as well.
        // SAFETY: the cluster is connected.
        check(unsafe { (library.rados_wait_for_latest_osdmap)(cluster) })
    }

    /// Releases the lock.
    pub(super) fn unlock(&self) -> std::io::Result<()> {
        // SAFETY: the image is open.
        check(unsafe { (self.library.rbd_lock_release)(self.handle) })
    }

    /// A value of the image's metadata.
    pub(super) fn value(&self, key: &CStr) -> std::io::Result<Option<String>> {
        let mut room = vec![0u8; VALUE_MAX];
        let mut len = room.len();
        // SAFETY: the image is open, the key is a C string, and `room` has `len` bytes.
        let got = unsafe {
            (self.library.rbd_metadata_get)(self.handle, key.as_ptr(), room.as_mut_ptr().cast(), &mut len)
        };
        if got == -libc::ENOENT {
            return Ok(None);
        }
        check(got)?;
        let text = CStr::from_bytes_until_nul(&room).map_err(std::io::Error::other)?;
        Ok(Some(text.to_string_lossy().into_owned()))
    }

    /// Sets a value of the image's metadata; or removes it.
    pub(super) fn set_value(&self, key: &CStr, value: Option<&str>) -> std::io::Result<()> {
        let value = value.map(CString::new).transpose().map_err(std::io::Error::other)?;
        let Image { library, handle, .. } = self;
        // SAFETY: the image is open, and key and value are C strings.
        let done = unsafe {
            match &value {
                Some(value) => (library.rbd_metadata_set)(*handle, key.as_ptr(), value.as_ptr()),
                None => (library.rbd_metadata_remove)(*handle, key.as_ptr()),
            }
        };
        match done {
            error if error == -libc::ENOENT && value.is_none() => Ok(()),
            done => check(done),
        }
    }

    /// Closes it. Nothing is under way.
    pub(super) fn close(&self) {
        // SAFETY: the image is open, and the process ends without using it again.
        unsafe { (self.library.rbd_close)(self.handle) };
    }
}

/// Called by librbd when an operation has ended.
///
/// # Safety
/// `request` is the box that [`Image::begin`] gave away with this completion, and this is called once.
unsafe extern "C" fn ended<R: Ends>(completion: Handle, request: *mut c_void) {
    // It is loaded: somebody has called it.
    let Ok(library) = library::load() else { return };
    // SAFETY: librbd calls this when the operation has ended, once, and does not use either again.
    let (result, request) = unsafe {
        let result = (library.rbd_aio_get_return_value)(completion);
        (library.rbd_aio_release)(completion);
        (result as i64, Box::from_raw(request.cast::<R>()))
    };
    request.ended(result);
}

fn check(result: c_int) -> std::io::Result<()> {
    match result {
        0.. => Ok(()),
        error => Err(std::io::Error::from_raw_os_error(-error)),
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|e| Error::of(Kind::Usage, e))
}

fn not_connected(e: &std::io::Error, image: &nbd::Image) -> Error {
    let (conf, keyring) = (image.conf(), image.keyring());
    let hint = match e.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ETIMEDOUT) => format!("no monitor answers; look at mon_host in {}", conf.display()),
        Some(Errno::ENOENT | Errno::EACCES | Errno::EPERM) => {
            format!("{} is to have a key of client.{} that the cluster knows", keyring.display(), image.id())
        }
        _ => format!("look at {} and {}", conf.display(), keyring.display()),
    };
    Error::new(Kind::Other, format!("connect to the Ceph cluster: {e}; {hint}"))
}

fn explained(e: &std::io::Error, what: &str, image: &nbd::Image) -> Error {
    let (kind, hint) = match e.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => {
            let message =
                format!("{what} is not there; \"volume create\" makes an image where it is given --size");
            (Kind::NotFound, message)
        }
        Some(Errno::EPERM | Errno::EACCES) => {
            let message = format!(
                "client.{} may not use {what}; docs/ceph.md has the caps that it needs, and \"rbd pool init \
                 {}\" has to be done once",
                image.id(),
                image.pool()
            );
            (Kind::Other, message)
        }
        _ => (Kind::Other, format!("open {what}: {e}")),
    };
    Error::new(kind, hint)
}
