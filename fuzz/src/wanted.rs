//! What is to come of a layer that was pulled lazily, as it lies in the store (`<uuid>.wanted`).

use sealblk::backup::{wanted_again, with_wanted_mac};
use sealblk::base::Kind;
use sealblk::catalog::coming::Head;
use sealblk::crypt::BackupKeys;
use sealblk::crypt::secret_mem::SecretMem;
use std::sync::LazyLock;

static KEYS: LazyLock<BackupKeys> = LazyLock::new(|| {
    let mut secret = SecretMem::new(BackupKeys::LEN).expect("locked memory");
    secret.as_mut_slice().fill(1);
    BackupKeys::from_secret(secret).expect("as long as keys are")
});

/// A file's bytes, but for the MAC: as a stranger leaves them, and as somebody with the keys would.
pub fn run(data: &[u8]) {
    if let Err(e) = Head::read(data) {
        assert_eq!(e.kind(), Kind::Corrupt);
    }
    let refused = wanted_again(data, &KEYS).expect_err("nobody guesses a MAC");
    assert_eq!(refused.kind(), Kind::Corrupt);
    match wanted_again(&with_wanted_mac(data, &KEYS), &KEYS) {
        Err(e) => assert_eq!(e.kind(), Kind::Corrupt),
        Ok((again, says_where)) => {
            // What proves right can be shown to people before.
            Head::read(data).expect("it has a head");
            assert_eq!(
                wanted_again(&again, &KEYS).expect("it reads what it writes"),
                (again.clone(), says_where)
            );
            assert!(wanted_again(&again[..again.len() - 1], &KEYS).is_err());
        }
    }
}
