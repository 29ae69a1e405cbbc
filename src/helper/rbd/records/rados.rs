//! What is asked of the objects of a pool, by librados: maps of keys and values (omap), locks of objects
//! (cls_lock), and the blocklist. No pointer leaves this file.

use super::super::image::Pool;
use super::super::library::{Handle, Library};
use crate::backing::nbd;
use crate::base::{Context, Result};
use std::ffi::{CStr, CString, c_char, c_int};
use std::io::{self, ErrorKind};
use std::ptr::{null, null_mut};
use std::time::Duration;

/// `LIBRADOS_CMPXATTR_OP_EQ`.
const EQUAL: u8 = 1;
/// `LIBRADOS_LOCK_FLAG_MUST_RENEW`.
const MUST_RENEW: u8 = 1 << 1;
/// The name of the one lock that an object has.
const LOCK: &CStr = c"sealblk";
/// Names that are asked for at one time.
const AT_ONCE: u64 = 1000;
/// The most names of one object.
const NAMES_MAX: usize = 1 << 20;
/// Seconds that a client is refused for which has lost a lock. Nothing that it has under way takes as long.
const REFUSED: u32 = 24 * 3600;
/// Room for what is told of an object's lock, in bytes.
const ROOM: usize = 4096;

/// A pool that is connected to. Its functions may be called from any thread, and at one time.
pub(super) struct Rados {
    library: &'static Library,
    cluster: Handle,
    context: Handle,
    /// The address of this client, as Ceph shows it to others.
    address: String,
}

// SAFETY: librados' functions on a cluster and on a context of it may be called from all threads at one time;
// nothing here changes.
unsafe impl Send for Rados {}
// SAFETY: as above.
unsafe impl Sync for Rados {}

/// A part of a change of an object. All parts of one change are done, or none.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part<'a> {
    /// The object is there from now on.
    Make,
    /// Only if the object is there.
    IsThere,
    /// Only if the key has this value; without a value, only if it has none.
    Has(&'a str, Option<&'a [u8]>),
    Set(&'a str, &'a [u8]),
    Unset(&'a str),
}

/// Who has an object's lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Locker {
    client: String,
    cookie: String,
}

impl Rados {
    /// Connects to the pool of this image.
    ///
    /// # Errors
    /// What is in the way, in words for whoever looks after Ceph.
    pub(super) fn connect(image: &nbd::Image) -> Result<Rados> {
        let Pool { library, cluster, context, address } = Pool::connect(image)?;
        Ok(Rados { library, cluster, context, address })
    }

    /// The address of this client.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// The id of the cluster.
    pub(super) fn fsid(&self) -> Result<String> {
        let mut room = [0u8; 64];
        // SAFETY: the cluster is connected, and `room` has as many bytes as is said.
        let got =
            unsafe { (self.library.rados_cluster_fsid)(self.cluster, room.as_mut_ptr().cast(), room.len()) };
        check(got).context(|| "ask for the cluster's id")?;
        let text = CStr::from_bytes_until_nul(&room).map_err(io::Error::other)?;
        Ok(text.to_string_lossy().into_owned())
    }

    /// The value of a key; none if the key, or the object, is not there.
    pub(super) fn value(&self, object: &str, key: &str) -> io::Result<Option<Vec<u8>>> {
        let (object, key) = (c_string(object)?, c_string(key)?);
        let (keys, lengths) = ([key.as_ptr()], [key.as_bytes().len()]);
        let (mut values, mut result) = (null_mut(), 0);
        let library = self.library;
        // SAFETY: the operation is made and released here; the arrays have one element and live until the
        // operation is over, as the places for its results do.
        let done = unsafe {
            let operation = (library.rados_create_read_op)();
            (library.rados_read_op_omap_get_vals_by_keys2)(
                operation,
                keys.as_ptr(),
                1,
                lengths.as_ptr(),
                &mut values,
                &mut result,
            );
            let done = (library.rados_read_op_operate)(operation, self.context, object.as_ptr(), 0);
            (library.rados_release_read_op)(operation);
            done
        };
        let values = Values { library, handle: values };
        if done == -libc::ENOENT {
            return Ok(None);
        }
        check(done)?;
        check(result)?;
        Ok(values.next()?.map(|(_, value)| value))
    }

    /// The keys of an object; none if that is not there.
    pub(super) fn keys(&self, object: &str) -> io::Result<Option<Vec<String>>> {
        let object = c_string(object)?;
        let mut keys: Vec<String> = Vec::new();
        loop {
            let after = c_string(keys.last().map_or("", String::as_str))?;
            let (mut values, mut is_more, mut result) = (null_mut(), 0, 0);
            let library = self.library;
            // SAFETY: as in `value`.
            let done = unsafe {
                let operation = (library.rados_create_read_op)();
                (library.rados_read_op_omap_get_keys2)(
                    operation,
                    after.as_ptr(),
                    AT_ONCE,
                    &mut values,
                    &mut is_more,
                    &mut result,
                );
                let done = (library.rados_read_op_operate)(operation, self.context, object.as_ptr(), 0);
                (library.rados_release_read_op)(operation);
                done
            };
            let values = Values { library, handle: values };
            if done == -libc::ENOENT && keys.is_empty() {
                return Ok(None);
            }
            check(done)?;
            check(result)?;
            let before = keys.len();
            while let Some((key, _)) = values.next()? {
                keys.push(key);
            }
            // What is told could go on for ever.
            if is_more == 0 || keys.len() == before || keys.len() > NAMES_MAX {
                return Ok(Some(keys));
            }
        }
    }

    /// Changes an object, in one step.
    ///
    /// # Errors
    /// `ECANCELED` if a key has not the value that it is to have; `ENOENT` if the object is to be there, and
    /// is not; those of Ceph.
    pub(super) fn change(&self, object: &str, parts: &[Part<'_>]) -> io::Result<()> {
        let object = c_string(object)?;
        let library = self.library;
        // Where results of parts are put, which the result of the whole tells as well.
        let mut results: Vec<c_int> = vec![0; parts.len()];
        // SAFETY: it takes nothing.
        let operation = unsafe { (library.rados_create_write_op)() };
        let mut add = || -> io::Result<()> {
            for (part, result) in parts.iter().zip(results.iter_mut()) {
                // SAFETY: the operation was made above. Keys and values are copied by the calls, which read
                // as many bytes as is said; `result` lives until the operation is released.
                unsafe {
                    match *part {
                        Part::Make => (library.rados_write_op_create)(operation, 0, null()),
                        Part::IsThere => (library.rados_write_op_assert_exists)(operation),
                        Part::Has(key, value) => {
                            let key = c_string(key)?;
                            let value = value.unwrap_or_default();
                            (library.rados_write_op_omap_cmp2)(
                                operation,
                                key.as_ptr(),
                                EQUAL,
                                value.as_ptr().cast(),
                                key.as_bytes().len(),
                                value.len(),
                                result,
                            );
                        }
                        Part::Set(key, value) => {
                            let key = c_string(key)?;
                            let (keys, values) = ([key.as_ptr()], [value.as_ptr().cast::<c_char>()]);
                            let lengths = ([key.as_bytes().len()], [value.len()]);
                            (library.rados_write_op_omap_set2)(
                                operation,
                                keys.as_ptr(),
                                values.as_ptr(),
                                lengths.0.as_ptr(),
                                lengths.1.as_ptr(),
                                1,
                            );
                        }
                        Part::Unset(key) => {
                            let key = c_string(key)?;
                            let (keys, lengths) = ([key.as_ptr()], [key.as_bytes().len()]);
                            (library.rados_write_op_omap_rm_keys2)(
                                operation,
                                keys.as_ptr(),
                                lengths.as_ptr(),
                                1,
                            );
                        }
                    }
                }
            }
            Ok(())
        };
        let added = add();
        // SAFETY: as above; it is released once, whether it was done or not.
        let done = unsafe {
            let done = match added {
                Ok(()) => {
                    (library.rados_write_op_operate2)(operation, self.context, object.as_ptr(), null_mut(), 0)
                }
                Err(_) => 0,
            };
            (library.rados_release_write_op)(operation);
            done
        };
        added?;
        check(done)
    }

    /// Removes an object; one that is not there is as good.
    pub(super) fn remove_object(&self, object: &str) -> io::Result<()> {
        let object = c_string(object)?;
        // SAFETY: the context is open, and the name is a C string.
        match check(unsafe { (self.library.rados_remove)(self.context, object.as_ptr()) }) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    /// Takes an object's lock for this time, as the owner of `cookie`; to `renew`, only if it is that one's.
    ///
    /// # Errors
    /// `EBUSY` if it is another's; `ENOENT` to renew what nobody has.
    pub(super) fn lock(&self, object: &str, cookie: &str, time: Duration, renew: bool) -> io::Result<()> {
        let (object, cookie) = (c_string(object)?, c_string(cookie)?);
        let mut time = libc::timeval { tv_sec: time.as_secs() as libc::time_t, tv_usec: 0 };
        let flags = if renew { MUST_RENEW } else { 0 };
        // SAFETY: the context is open, the texts are C strings, and the time is read by the call.
        check(unsafe {
            (self.library.rados_lock_exclusive)(
                self.context,
                object.as_ptr(),
                LOCK.as_ptr(),
                cookie.as_ptr(),
                c"".as_ptr(),
                &mut time,
                flags,
            )
        })
    }

    /// Lets go of an object's lock.
    pub(super) fn unlock(&self, object: &str, cookie: &str) -> io::Result<()> {
        let (object, cookie) = (c_string(object)?, c_string(cookie)?);
        // SAFETY: as above.
        check(unsafe {
            (self.library.rados_unlock)(self.context, object.as_ptr(), LOCK.as_ptr(), cookie.as_ptr())
        })
    }

    /// Who has an object's lock.
    pub(super) fn lockers(&self, object: &str) -> io::Result<Vec<Locker>> {
        let object = c_string(object)?;
        let (mut is_exclusive, mut rooms) = (0, [[0u8; ROOM]; 4]);
        let mut lengths = [ROOM; 4];
        let [tag, clients, cookies, addresses] = &mut rooms;
        let [tag_len, clients_len, cookies_len, addresses_len] = &mut lengths;
        // SAFETY: the context is open, and each of the four rooms has as many bytes as is said.
        let got = unsafe {
            (self.library.rados_list_lockers)(
                self.context,
                object.as_ptr(),
                LOCK.as_ptr(),
                &mut is_exclusive,
                tag.as_mut_ptr().cast(),
                tag_len,
                clients.as_mut_ptr().cast(),
                clients_len,
                cookies.as_mut_ptr().cast(),
                cookies_len,
                addresses.as_mut_ptr().cast(),
                addresses_len,
            )
        };
        match got {
            0.. => Ok(locker_of(clients, cookies, got as usize)),
            error if error == -(libc::ENOENT as isize) => Ok(Vec::new()),
            error => Err(io::Error::from_raw_os_error(i32::try_from(-error).unwrap_or(libc::EIO))),
        }
    }

    /// Takes an object's lock from whoever has it.
    pub(super) fn break_lock(&self, object: &str, locker: &Locker) -> io::Result<()> {
        let object = c_string(object)?;
        let (client, cookie) = (c_string(&locker.client)?, c_string(&locker.cookie)?);
        // SAFETY: the context is open, and the texts are C strings.
        check(unsafe {
            (self.library.rados_break_lock)(
                self.context,
                object.as_ptr(),
                LOCK.as_ptr(),
                client.as_ptr(),
                cookie.as_ptr(),
            )
        })
    }

    /// Has Ceph take nothing any more from the client of this address, from all that is asked here from now
    /// on.
    pub(super) fn refuse(&self, address: &str) -> io::Result<()> {
        let address = c_string(address)?;
        // SAFETY: the cluster is connected, and the address is a C string.
        check(unsafe { (self.library.rados_blocklist_add)(self.cluster, address.as_ptr(), REFUSED) })?;
        // What is asked of an OSD with this map, the OSD does not do before it has the map as well.
        // SAFETY: the cluster is connected.
        check(unsafe { (self.library.rados_wait_for_latest_osdmap)(self.cluster) })
    }

    /// Makes an image so many bytes long, if it is shorter.
    pub(super) fn make_longer(&self, name: &str, len: u64) -> io::Result<()> {
        let name = c_string(name)?;
        let (library, mut image, mut now) = (self.library, null_mut(), 0);
        // SAFETY: the context is open, and the name is a C string; `image` takes a pointer.
        check(unsafe { (library.rbd_open)(self.context, name.as_ptr(), &mut image, null()) })?;
        // SAFETY: the image was opened above, and is closed once, here; the number has room.
        let done = unsafe {
            let got = (library.rbd_get_size)(image, &mut now);
            let done = if got >= 0 && now < len { (library.rbd_resize)(image, len) } else { got };
            let closed = (library.rbd_close)(image);
            if done < 0 { done } else { closed }
        };
        check(done)
    }

    /// Removes an image.
    pub(super) fn remove_image(&self, name: &str) -> io::Result<()> {
        let name = c_string(name)?;
        // SAFETY: the context is open, and the name is a C string.
        check(unsafe { (self.library.rbd_remove)(self.context, name.as_ptr()) })
    }
}

/// Who has a lock, out of `count` texts in each of these rooms, each with a zero behind it.
fn locker_of(clients: &[u8], cookies: &[u8], count: usize) -> Vec<Locker> {
    let texts = |room: &[u8]| -> Vec<String> {
        room.split(|byte| *byte == 0).take(count).map(|it| String::from_utf8_lossy(it).into_owned()).collect()
    };
    let pairs = texts(clients).into_iter().zip(texts(cookies));
    pairs.map(|(client, cookie)| Locker { client, cookie }).collect()
}

/// What an operation has brought: keys and values.
struct Values {
    library: &'static Library,
    handle: Handle,
}

impl Values {
    /// The next key, and its value.
    fn next(&self) -> io::Result<Option<(String, Vec<u8>)>> {
        if self.handle.is_null() {
            return Ok(None);
        }
        let (mut key, mut value) = (null_mut::<c_char>(), null_mut::<c_char>());
        let (mut key_len, mut value_len) = (0, 0);
        // SAFETY: the handle is of an operation that is over, and is released when this is dropped; the
        // places take what is told.
        let got = unsafe {
            (self.library.rados_omap_get_next2)(
                self.handle,
                &mut key,
                &mut value,
                &mut key_len,
                &mut value_len,
            )
        };
        check(got)?;
        if key.is_null() {
            return Ok(None);
        }
        let bytes = |at: *mut c_char, len: usize| match at.is_null() {
            true => Vec::new(),
            // SAFETY: the call has put `len` bytes there, which stay until the handle is released.
            false => unsafe { std::slice::from_raw_parts(at.cast::<u8>(), len) }.to_vec(),
        };
        Ok(Some((String::from_utf8_lossy(&bytes(key, key_len)).into_owned(), bytes(value, value_len))))
    }
}

impl Drop for Values {
    fn drop(&mut self) {
        if !self.handle.is_null() {
            // SAFETY: nobody else has the handle, and it is not used any more.
            unsafe { (self.library.rados_omap_get_end)(self.handle) };
        }
    }
}

fn check(result: c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|e| io::Error::new(ErrorKind::InvalidInput, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_a_lock_is_read_out_of_what_is_told() {
        let locker = |client: &str, cookie: &str| Locker { client: client.into(), cookie: cookie.into() };
        assert_eq!(locker_of(b"client.7\0\0", b"x\0\0", 1), [locker("client.7", "x")]);
        assert_eq!(locker_of(b"a\0b\0", b"x\0y\0", 2), [locker("a", "x"), locker("b", "y")]);
        assert_eq!(locker_of(b"a\0", b"", 9).len(), 1, "as many as there are of both");
        assert!(locker_of(b"a\0", b"x\0", 0).is_empty());
    }
}
