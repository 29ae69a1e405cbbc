//! AES-256-XTS against other implementations and published vectors, for every engine that this CPU can run.

use aes::Aes256;
use aes::cipher::KeyInit;
use sealblk::crypt::Dek;
use sealblk::crypt::xts::{DataUnit, Engine, SectorCipher, new_cipher};
use vm_memory::VolatileSlice;
use xts_mode::{Xts128, get_tweak_default};

#[test]
fn quick() {
    let key: Vec<u8> = (0..64).collect();
    let dek = Dek::from_bytes(&key).unwrap();
    let oracle =
        Xts128::new(Aes256::new_from_slice(&key[..32]).unwrap(), Aes256::new_from_slice(&key[32..]).unwrap());
    for engine in Engine::available() {
        for unit in [DataUnit::B512, DataUnit::B4096] {
            let cipher: Box<dyn SectorCipher> = new_cipher(engine, &dek, unit).unwrap();
            for units in [1, 2, 3, 5, 8, 64, 65, 200] {
                let len = units * unit.bytes();
                let plain: Vec<u8> = (0..len).map(|i| (i * 7 + i / 256) as u8).collect();
                let first = 8 * 12345;
                let mut expected = plain.clone();
                for (i, chunk) in expected.chunks_mut(unit.bytes()).enumerate() {
                    oracle
                        .encrypt_sector(chunk, get_tweak_default((first + i as u64 * unit.sectors()).into()));
                }
                let mut a = plain.clone();
                cipher.encrypt_in_place(&mut a, first);
                assert!(a == expected, "{engine} {unit:?} {units}");
                let mut b = vec![0; len];
                let mut src = plain.clone();
                cipher.encrypt(VolatileSlice::from(&mut src[..]), &mut b, first);
                assert!(b == expected);
                let mut back = vec![0; len];
                cipher.decrypt(&b, VolatileSlice::from(&mut back[..]), first);
                assert!(back == plain);
                cipher.decrypt_in_place(&mut b, first);
                assert!(b == plain);
            }
        }
    }
}
