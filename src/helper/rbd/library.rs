//! The functions of librbd and librados that are used, which are found at run time: where no Ceph is, nothing
//! of it is needed.

use crate::base::{Error, Kind, Result};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// What holds the functions, by the names that all their versions since Ceph 15 have.
const LIBRADOS: &CStr = c"librados.so.2";
const LIBRBD: &CStr = c"librbd.so.1";

/// `rados_t`, `rados_ioctx_t`, `rbd_image_t` and `rbd_completion_t` of C.
pub(super) type Handle = *mut c_void;
/// What is called when an operation of librbd has ended.
pub(super) type Done = unsafe extern "C" fn(Handle, *mut c_void);
/// What is called for each run of bytes that an image has.
pub(super) type Run = unsafe extern "C" fn(u64, usize, c_int, *mut c_void) -> c_int;

/// `rbd_image_watcher_t` of C.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Watcher {
    pub(super) address: *mut c_char,
    pub(super) id: i64,
    pub(super) cookie: u64,
}

macro_rules! functions {
    ($($library:ident { $($name:ident($($argument:ty),*) -> $result:ty;)* })*) => {
        /// The functions, with the types that Ceph's headers (rados/librados.h, rbd/librbd.h) give them.
        pub(super) struct Library {
            $($(pub(super) $name: unsafe extern "C" fn($($argument),*) -> $result,)*)*
        }

        impl Library {
            fn load() -> Result<Library> {
                Ok(Library { $($($name: {
                    let found = symbol(open($library)?, concat!(stringify!($name), "\0"))?;
                    // SAFETY: `found` is the address of the function of this name in Ceph's library, and its
                    // type there is the one that stands in the table; the library is never unloaded.
                    unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) -> $result>(found) }
                },)*)* })
            }
        }
    };
}

functions! {
    LIBRADOS {
        rados_create2(*mut Handle, *const c_char, *const c_char, u64) -> c_int;
        rados_conf_read_file(Handle, *const c_char) -> c_int;
        rados_conf_set(Handle, *const c_char, *const c_char) -> c_int;
        rados_conf_get(Handle, *const c_char, *mut c_char, usize) -> c_int;
        rados_connect(Handle) -> c_int;
        rados_getaddrs(Handle, *mut *mut c_char) -> c_int;
        rados_buffer_free(*mut c_char) -> ();
        rados_ioctx_create(Handle, *const c_char, *mut Handle) -> c_int;
        rados_ioctx_set_namespace(Handle, *const c_char) -> ();
        rados_set_pool_full_try(Handle) -> ();
        rados_mon_command(Handle, *mut *const c_char, usize, *const c_char, usize, *mut *mut c_char, *mut usize, *mut *mut c_char, *mut usize) -> c_int;
        rados_wait_for_latest_osdmap(Handle) -> c_int;
        rados_blocklist_add(Handle, *const c_char, u32) -> c_int;
        rados_cluster_fsid(Handle, *mut c_char, usize) -> c_int;
        rados_create_write_op() -> Handle;
        rados_release_write_op(Handle) -> ();
        rados_write_op_create(Handle, c_int, *const c_char) -> ();
        rados_write_op_assert_exists(Handle) -> ();
        rados_write_op_omap_cmp2(Handle, *const c_char, u8, *const c_char, usize, usize, *mut c_int) -> ();
        rados_write_op_omap_set2(Handle, *const *const c_char, *const *const c_char, *const usize, *const usize, usize) -> ();
        rados_write_op_omap_rm_keys2(Handle, *const *const c_char, *const usize, usize) -> ();
        rados_write_op_operate2(Handle, Handle, *const c_char, *mut c_void, c_int) -> c_int;
        rados_create_read_op() -> Handle;
        rados_release_read_op(Handle) -> ();
        rados_read_op_omap_get_vals_by_keys2(Handle, *const *const c_char, usize, *const usize, *mut Handle, *mut c_int) -> ();
        rados_read_op_omap_get_keys2(Handle, *const c_char, u64, *mut Handle, *mut u8, *mut c_int) -> ();
        rados_read_op_operate(Handle, Handle, *const c_char, c_int) -> c_int;
        rados_omap_get_next2(Handle, *mut *mut c_char, *mut *mut c_char, *mut usize, *mut usize) -> c_int;
        rados_omap_get_end(Handle) -> ();
        rados_remove(Handle, *const c_char) -> c_int;
        rados_lock_exclusive(Handle, *const c_char, *const c_char, *const c_char, *const c_char, *mut libc::timeval, u8) -> c_int;
        rados_unlock(Handle, *const c_char, *const c_char, *const c_char) -> c_int;
        rados_break_lock(Handle, *const c_char, *const c_char, *const c_char, *const c_char) -> c_int;
        rados_list_lockers(Handle, *const c_char, *const c_char, *mut c_int, *mut c_char, *mut usize, *mut c_char, *mut usize, *mut c_char, *mut usize, *mut c_char, *mut usize) -> isize;
    }
    LIBRBD {
        rbd_create2(Handle, *const c_char, u64, u64, *mut c_int) -> c_int;
        rbd_open(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
        rbd_open_read_only(Handle, *const c_char, *mut Handle, *const c_char) -> c_int;
        rbd_close(Handle) -> c_int;
        rbd_remove(Handle, *const c_char) -> c_int;
        rbd_resize(Handle, u64) -> c_int;
        rbd_get_size(Handle, *mut u64) -> c_int;
        rbd_get_features(Handle, *mut u64) -> c_int;
        rbd_aio_create_completion(*mut c_void, Done, *mut Handle) -> c_int;
        rbd_aio_get_return_value(Handle) -> isize;
        rbd_aio_release(Handle) -> ();
        rbd_aio_read(Handle, u64, usize, *mut c_char, Handle) -> c_int;
        rbd_aio_write(Handle, u64, usize, *const c_char, Handle) -> c_int;
        rbd_aio_write_zeroes(Handle, u64, usize, Handle, c_int, c_int) -> c_int;
        rbd_aio_flush(Handle, Handle) -> c_int;
        rbd_diff_iterate2(Handle, *const c_char, u64, u64, u8, u8, Run, *mut c_void) -> c_int;
        rbd_lock_acquire(Handle, c_uint) -> c_int;
        rbd_lock_release(Handle) -> c_int;
        rbd_lock_break(Handle, c_uint, *const c_char) -> c_int;
        rbd_lock_get_owners(Handle, *mut c_uint, *mut *mut c_char, *mut usize) -> c_int;
        rbd_lock_get_owners_cleanup(*mut *mut c_char, usize) -> ();
        rbd_is_exclusive_lock_owner(Handle, *mut c_int) -> c_int;
        rbd_watchers_list(Handle, *mut Watcher, *mut usize) -> c_int;
        rbd_watchers_list_cleanup(*mut Watcher, usize) -> ();
        rbd_metadata_get(Handle, *const c_char, *mut c_char, *mut usize) -> c_int;
        rbd_metadata_set(Handle, *const c_char, *const c_char) -> c_int;
        rbd_metadata_remove(Handle, *const c_char) -> c_int;
    }
}

static LOADED: OnceLock<Library> = OnceLock::new();

/// Loads the libraries, the first time.
///
/// # Errors
/// `Unsupported` where they are not installed, or too old.
pub(super) fn load() -> Result<&'static Library> {
    if LOADED.get().is_none() {
        let _ = LOADED.set(Library::load()?);
    }
    Ok(LOADED.get().expect("it was set above"))
}

fn open(name: &CStr) -> Result<*mut c_void> {
    // SAFETY: the name is a C string. What the library's constructors do is Ceph's affair; nothing else runs
    // in this process, which was made for that.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !library.is_null() {
        return Ok(library);
    }
    let package = if name == LIBRBD { "librbd1" } else { "librados2" };
    let message = format!(
        "{} cannot be loaded ({}); RBD images are reached by Ceph's libraries: install them (Debian: apt \
         install {package})",
        name.to_string_lossy(),
        failure()
    );
    Err(Error::new(Kind::Unsupported, message))
}

fn symbol(library: *mut c_void, name: &'static str) -> Result<*mut c_void> {
    // SAFETY: the library is open, and the name ends with a zero byte.
    let found = unsafe { libc::dlsym(library, name.as_ptr().cast()) };
    match found.is_null() {
        false => Ok(found),
        true => {
            let message = format!("Ceph's libraries are too old ({}); 16 or later is needed", failure());
            Err(Error::new(Kind::Unsupported, message))
        }
    }
}

/// What the loader says of its last failure.
fn failure() -> String {
    // SAFETY: one thread alone loads libraries here, so the text stays until it is copied.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "no reason is given".into();
    }
    // SAFETY: a text of dlerror's is a C string.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
