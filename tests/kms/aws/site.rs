//! A host whose volume is under a key of a KMS elsewhere, which it asks by AWS's protocol.

use crate::common::attach::Place;
use crate::common::kms_server::{KmsServer, Principal};
use crate::common::store::Store;
use sealblk::kms::embedded::Embedded;
use serde_json::{Value, json};

/// A KMS, who asks it, a key, and a host with a volume `t` under it.
pub struct Site {
    pub kms: KmsServer,
    pub who: Principal,
    pub key: String,
    pub place: Place,
}

impl Site {
    /// The host asks as the KMS's root principal; nothing is set except for `settings`.
    pub fn new(settings: &str) -> Self {
        Self::under(settings, |kms| kms.create_key("", None).expect("make a key").arn)
    }

    /// A site with these settings, and with the key that `make` makes.
    pub fn under(settings: &str, make: impl FnOnce(&Embedded) -> String) -> Self {
        let kms = KmsServer::start();
        let (who, key) = (kms.principal("root"), make(&kms.admin()));
        let store = Store::new();
        store.configure(settings);
        store.set_environment(who.environment(&kms.url));
        let place = Place::of(store, &["--key", &format!("aws:{key}")]);
        Site { kms, who, key, place }
    }

    /// From now on the host finds its KMS at `url`.
    pub fn move_to(&self, url: &str) {
        self.place.store.set_environment(self.who.environment(url));
    }

    /// An attach that is refused with this exit code, one more event, and this cause in
    /// it. Returns what it said.
    #[track_caller]
    pub fn refused(&self, code: i32, cause: &str) -> String {
        let before = self.place.events().len();
        let said = self.place.refuse(code, &[]);
        let events = self.place.events();
        assert_eq!(events.len(), before + 1, "{said}");
        let event = &events[before];
        assert_eq!(event["detail"]["cause"], cause, "{said}");
        assert_eq!(event["detail"]["result"], "failed");
        let key: Vec<&Value> = event["resources"].as_array().expect("a list").iter().skip(1).collect();
        assert_eq!(key, [&json!(self.place.key())]);
        said
    }
}
