//! What haul remembers of a job: its folder, its state after each step, and the lock that keeps a second run out.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::io::atomic;

/// How far a migration to an image has come. Each state is reached once the one before it is on disk, and the step
/// to the next may be repeated at any time.
///
/// ```text
/// Begun ──copy──> Copied ──verify──> Verified ──ImportImage──> Importing ──NORMAL──> Done
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum State {
    /// The folder exists; fix-ups and copy keep their own records in it.
    Begun,
    /// The object is complete.
    Copied,
    /// The object was read back and is what the manifest says.
    Verified,
    /// The cloud is importing.
    Importing {
        /// The image's id.
        image: String,
    },
    /// The image can be used.
    Done {
        /// The image's id.
        image: String,
    },
}

impl State {
    /// Whether a job may go from this state to `next`.
    pub fn may_become(&self, next: &State) -> bool {
        use State::{Begun, Copied, Done, Importing, Verified};
        match (self, next) {
            (Begun, Copied) | (Copied, Verified) | (Verified, Importing { .. }) => true,
            (Importing { image }, Done { image: done }) => image == done,
            _ => false,
        }
    }
}

/// A job on disk. `O` is what it was asked to do, `R` what it found out on the way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record<O, R> {
    /// Format version; 1.
    pub version: u32,
    /// The job's id.
    pub id: String,
    /// When it was begun, RFC 3339.
    pub created: String,
    /// What was asked for.
    pub options: O,
    /// How far it is.
    pub state: State,
    /// What is known so far.
    pub results: R,
}

/// A job that this process works on; no other can meanwhile.
pub struct Job<O, R> {
    /// Its record, as on disk.
    pub record: Record<O, R>,
    folder: PathBuf,
    _lock: Flock<File>,
}

/// The folder of all jobs below haul's own folder.
pub fn jobs_folder(state: &Path) -> PathBuf {
    state.join("jobs")
}

fn failed(path: &Path, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(Kind::Destination, "job.folder", format!("cannot use {}", path.display()))
        .remedy("free space there, or name another folder with --state-dir")
        .fact("path", path.display())
        .caused_by(error)
}

fn lock(folder: &Path) -> Result<Flock<File>> {
    let path = folder.join("lock");
    let file = File::create(&path).map_err(|error| failed(&path, error))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
        Error::new(Kind::Usage, "job.busy", format!("job {} is being worked on", folder.display()))
            .because(format!("another process holds its lock ({error})"))
            .remedy("wait for it, or stop it first")
    })
}

impl<O: Serialize + DeserializeOwned, R: Default + Serialize + DeserializeOwned> Job<O, R> {
    /// Begins a job named after `name`.
    pub fn begin(state: &Path, name: &str, options: O) -> Result<Self> {
        let now = time::OffsetDateTime::now_utc();
        let short: String = uuid::Uuid::new_v4().simple().to_string().chars().take(6).collect();
        let name: String = name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
            .collect();
        let name = name.trim_matches('-').get(..24).unwrap_or(name.trim_matches('-'));
        let id = format!("{name}-{:04}{:02}{:02}-{short}", now.year(), u8::from(now.month()), now.day());
        let folder = jobs_folder(state).join(&id);
        fs::create_dir_all(&folder).map_err(|error| failed(&folder, error))?;
        let created = now.format(&time::format_description::well_known::Rfc3339).unwrap_or_default();
        let record = Record { version: 1, id, created, options, state: State::Begun, results: R::default() };
        let job = Job { record, _lock: lock(&folder)?, folder };
        job.save()?;
        Ok(job)
    }

    /// Takes up the job `id`.
    pub fn open(state: &Path, id: &str) -> Result<Self> {
        let folder = jobs_folder(state).join(id);
        let record = read(&folder)?;
        Ok(Job { record, _lock: lock(&folder)?, folder })
    }

    /// The job's own folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Goes to `next`, durably.
    pub fn enter(&mut self, next: State) -> Result<()> {
        if !self.record.state.may_become(&next) {
            return Err(Error::new(Kind::Internal, "job.state", "a job took a step out of order")
                .because(format!("from {:?} to {next:?}", self.record.state)));
        }
        self.record.state = next;
        self.save()
    }

    /// Writes the record as it is.
    pub fn save(&self) -> Result<()> {
        let json = serde_json::to_vec_pretty(&self.record).map_err(|error| failed(&self.folder, error))?;
        atomic::write(&self.folder.join("job.json"), &json)
    }
}

/// Reads the record of the job in `folder`.
pub fn read<O: DeserializeOwned, R: DeserializeOwned>(folder: &Path) -> Result<Record<O, R>> {
    let path = folder.join("job.json");
    let unknown = |error: Box<dyn std::error::Error + Send + Sync>| {
        Error::new(Kind::Usage, "job.unknown", format!("there is no job at {}", folder.display()))
            .remedy("`haul jobs` lists the jobs of this host")
            .caused_by(error)
    };
    let bytes = fs::read(path).map_err(|error| unknown(error.into()))?;
    serde_json::from_slice(&bytes).map_err(|error| unknown(error.into()))
}

/// The ids of the jobs below haul's own folder, sorted.
pub fn list(state: &Path) -> Vec<String> {
    let entries = fs::read_dir(jobs_folder(state)).into_iter().flatten().flatten();
    let mut ids: Vec<String> = entries
        .filter(|entry| entry.path().join("job.json").exists())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    ids.sort();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    type Small = Job<String, Vec<String>>;

    #[test]
    fn a_job_goes_forward_only_and_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut job = Small::begin(dir.path(), "/dev/My Disk", "options".into()).unwrap();
        assert_eq!(job.enter(State::Verified).unwrap_err().id(), "job.state");
        job.enter(State::Copied).unwrap();
        job.enter(State::Verified).unwrap();
        job.enter(State::Importing { image: "img-1".into() }).unwrap();
        assert!(job.enter(State::Done { image: "img-2".into() }).is_err());
        let id = job.record.id.clone();
        assert_eq!(Small::open(dir.path(), &id).err().unwrap().id(), "job.busy");
        drop(job);
        assert_eq!(list(dir.path()), std::slice::from_ref(&id));
        let job = Small::open(dir.path(), &id).unwrap();
        assert_eq!(job.record.state, State::Importing { image: "img-1".into() });
        assert_eq!(Small::open(dir.path(), "other").err().unwrap().id(), "job.unknown");
    }
}
