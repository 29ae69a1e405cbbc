//! Entries, their marks, and changes of both.

use super::*;

/// A record that is one text; `a` may become `A` without a command.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Text(String);

impl Facts for Text {
    type Written = String;

    fn to_written(&self) -> String {
        self.0.clone()
    }

    fn from_written(written: String, _id: &str) -> Result<Self, String> {
        Ok(Text(written))
    }

    fn difference(&self, found: &Self) -> Option<String> {
        let is_ours = self.0 == found.0 || self.0.to_uppercase() == found.0;
        (!is_ours).then(|| format!("{} and not {}", found.0, self.0))
    }
}

fn text(text: &str) -> Text {
    Text(text.into())
}

struct Place {
    dir: tempfile::TempDir,
    ledger: Ledger,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        let ledger =
            Ledger { root: top.clone(), entries: top.join("ledger"), config: Some(top.join("config")) };
        ledger.begin().unwrap();
        Place { dir, ledger }
    }

    fn entry(&self) -> PathBuf {
        self.dir.path().join("ledger/a.json")
    }

    fn mark(&self) -> PathBuf {
        self.dir.path().join("config/marks/a")
    }

    fn doubt(&self, found: &str) -> Option<Doubt> {
        self.ledger.judge("a", &text(found)).unwrap()
    }
}

#[test]
fn a_change_may_have_been_made_or_not_until_it_is_settled() {
    let place = Place::new();
    assert_eq!(place.doubt("one"), Some(Doubt::Unknown));
    place.ledger.enter("a", text("one")).unwrap();
    assert_eq!(place.ledger.enter("a", text("two")).unwrap_err().kind(), Kind::Busy);
    assert_eq!(place.doubt("one"), None);
    assert_eq!(place.doubt("ONE"), None, "without a command");
    assert_eq!(place.doubt("two"), Some(Doubt::Differs("two and not one".into())));
    let mut change = place.ledger.change::<Text>("a").unwrap();
    change.expect(text("two")).unwrap();
    assert_eq!((place.doubt("one"), place.doubt("two")), (None, None));
    assert!(change.settle(text("three")).is_err());
    change.settle(text("TWO")).unwrap();
    assert_eq!(place.doubt("one"), Some(Doubt::Differs("one and not TWO".into())));
    assert_eq!(place.doubt("two"), Some(Doubt::Differs("two and not TWO".into())), "it does not go back");
    drop(change);
    place.ledger.forget("a").unwrap();
    place.ledger.forget("a").unwrap();
    assert_eq!(place.doubt("TWO"), Some(Doubt::Unknown));
    assert_eq!(place.ledger.ids().unwrap(), Vec::<String>::new());
}

#[test]
fn an_entry_is_one_behind_its_mark_never() {
    let place = Place::new();
    place.ledger.enter("a", text("one")).unwrap();
    let (entry, mark) = (std::fs::read(place.entry()).unwrap(), std::fs::read(place.mark()).unwrap());
    place.ledger.change("a").unwrap().expect(text("two")).unwrap();
    assert_ne!(std::fs::read(place.mark()).unwrap(), mark);
    let later = std::fs::read(place.entry()).unwrap();
    std::fs::write(place.entry(), &entry).unwrap();
    assert_eq!(place.doubt("one"), Some(Doubt::Older));
    assert!(place.ledger.change::<Text>("a").is_err());
    // A cut came before the mark.
    std::fs::write(place.entry(), &later).unwrap();
    std::fs::write(place.mark(), &mark).unwrap();
    assert_eq!((place.doubt("one"), place.doubt("two")), (None, None));
    place.ledger.change("a").unwrap().settle(text("two")).unwrap();
    std::fs::write(place.entry(), &later).unwrap();
    assert_eq!(place.doubt("one"), Some(Doubt::Older));
    // What an operator accepts is above whatever there was.
    place.ledger.accept("a", text("three")).unwrap();
    assert_eq!((place.doubt("three"), place.doubt("two").is_some()), (None, true));
    std::fs::write(place.mark(), "x\n").unwrap();
    assert_eq!(place.ledger.judge("a", &text("three")).unwrap_err().kind(), Kind::Corrupt);
}

#[test]
fn an_entry_is_bound_to_its_key_and_its_id() {
    let (place, other) = (Place::new(), Place::new());
    for id in ["a", "b"] {
        place.ledger.enter(id, text(id)).unwrap();
    }
    std::fs::copy(place.dir.path().join("ledger/b.json"), place.entry()).unwrap();
    assert_eq!(place.doubt("b"), Some(Doubt::Forged));
    other.ledger.enter("a", text("a")).unwrap();
    std::fs::copy(other.entry(), place.entry()).unwrap();
    assert_eq!(place.doubt("a"), Some(Doubt::Forged));
    // A key that was there is the one that stays.
    let key = std::fs::read(place.dir.path().join("config/key")).unwrap();
    place.ledger.begin().unwrap();
    assert_eq!(std::fs::read(place.dir.path().join("config/key")).unwrap(), key);
    assert_eq!(place.ledger.judge("b", &text("b")).unwrap(), None);
}

#[test]
fn two_commands_change_one_after_the_other() {
    let place = Place::new();
    place.ledger.enter("a", text("0")).unwrap();
    std::thread::scope(|scope| {
        for n in 1..=8 {
            let ledger = &place.ledger;
            scope.spawn(move || {
                let mut change = ledger.change("a").unwrap();
                change.expect(text(&n.to_string())).unwrap();
                assert_eq!(change.accepted.len(), 2, "the other one's was settled");
                change.settle(text(&n.to_string())).unwrap();
            });
        }
    });
    assert_eq!(read_mark(&File::open(place.mark()).unwrap()).unwrap(), 1 + 2 * 8);
}
