//! A guest's file tree, read without mounting it: every path and every link is resolved inside the guest's root,
//! over all its file systems.

use std::collections::BTreeMap;
use std::io::Read;

use crate::error::{Error, Kind, Result};

/// Links followed in one path, as in Linux (path_resolution(7)).
const MAX_LINKS: usize = 40;
/// Longest path, in bytes, as in Linux.
const MAX_PATH: usize = 4096;
/// Longest text file haul reads whole, in bytes.
pub const MAX_TEXT: u64 = 4 << 20;
/// Most names read from one folder.
pub const MAX_NAMES: usize = 65_536;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// A regular file of this many bytes.
    File(u64),
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A device, socket or pipe.
    Other,
}

/// One file system of a guest. Paths are absolute, normalised (`/a/b`), and never go through a link.
pub trait Volume {
    /// What is at `path`, a link not followed; `None` when nothing is.
    fn node(&self, path: &str) -> Result<Option<Node>>;
    /// The target of the link at `path`.
    fn link(&self, path: &str) -> Result<String>;
    /// The names in the folder at `path`; those that are not UTF-8 are left out.
    fn names(&self, path: &str) -> Result<Vec<String>>;
    /// The content of the file at `path`.
    fn open(&self, path: &str) -> Result<Box<dyn Read + '_>>;
}

/// All of a guest's file systems, put together as the guest mounts them.
#[derive(Default)]
pub struct Tree {
    /// Mount point (`""` for the root, `/boot`), and what is there; the longest that matches counts.
    volumes: BTreeMap<String, Box<dyn Volume>>,
}

impl Tree {
    /// A tree with the root file system `root`.
    pub fn new(root: Box<dyn Volume>) -> Self {
        Tree { volumes: BTreeMap::from([(String::new(), root)]) }
    }

    /// Adds the file system mounted at `point`, an absolute path without links.
    pub fn mount(&mut self, point: &str, volume: Box<dyn Volume>) {
        self.volumes.insert(point.trim_end_matches('/').to_owned(), volume);
    }

    /// Whether a file system of its own is mounted at `point`.
    pub fn is_mount_point(&self, point: &str) -> bool {
        self.volumes.contains_key(point.trim_end_matches('/'))
    }

    /// The volume that holds `path`, and the path on it.
    fn place<'a>(&'a self, path: &'a str) -> Result<(&'a dyn Volume, &'a str)> {
        let found = self.volumes.iter().rev().find_map(|(point, volume)| {
            let rest = path.strip_prefix(point.as_str())?;
            (rest.is_empty() || rest.starts_with('/')).then_some((&**volume, rest))
        });
        let (volume, rest) = found.ok_or_else(|| bad_path(path, "it is not absolute"))?;
        Ok((volume, if rest.is_empty() { "/" } else { rest }))
    }

    fn node_at(&self, path: &str) -> Result<Option<Node>> {
        let (volume, rest) = self.place(path)?;
        volume.node(rest)
    }

    /// The path `path` leads to, links followed, with no link in it; `None` when nothing is there. `..` never
    /// leaves the root.
    pub fn resolve(&self, path: &str) -> Result<Option<String>> {
        self.walk(path, true).map(|found| found.map(|(path, _)| path))
    }

    fn walk(&self, path: &str, follow_last: bool) -> Result<Option<(String, Node)>> {
        let mut links = 0;
        let mut todo: Vec<String> = components(path);
        let mut done = String::new();
        let mut node = Node::Folder;
        while let Some(name) = todo.pop() {
            if name == ".." {
                done.truncate(done.rfind('/').unwrap_or(0));
                node = Node::Folder;
                continue;
            }
            let next = format!("{done}/{name}");
            if next.len() > MAX_PATH {
                return Err(bad_path(path, "it is longer than 4096 bytes"));
            }
            if !matches!(node, Node::Folder) {
                return Ok(None);
            }
            let Some(found) = self.node_at(&next)? else { return Ok(None) };
            if found == Node::Link && (follow_last || !todo.is_empty()) {
                links += 1;
                if links > MAX_LINKS {
                    return Err(bad_path(path, "it leads through more than 40 links"));
                }
                let (volume, rest) = self.place(&next)?;
                let target = volume.link(rest)?;
                if target.starts_with('/') {
                    done.clear();
                }
                todo.extend(components(&target));
                node = Node::Folder;
                continue;
            }
            done = next;
            node = found;
        }
        if done.is_empty() {
            done.push('/');
        }
        Ok(Some((done, node)))
    }

    /// The same, where circles lead nowhere.
    pub fn real(&self, path: &str) -> Result<Option<String>> {
        match self.resolve(path) {
            Err(error) if error.id() == "guest.path" => Ok(None),
            found => found,
        }
    }

    /// What `path` leads to, links followed. A path that leads nowhere, or in circles, is nothing.
    pub fn node(&self, path: &str) -> Result<Option<Node>> {
        match self.walk(path, true) {
            Ok(found) => Ok(found.map(|(_, node)| node)),
            Err(error) if error.id() == "guest.path" => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether a file or folder is at `path`, links followed.
    pub fn exists(&self, path: &str) -> Result<bool> {
        Ok(self.node(path)?.is_some())
    }

    /// The target of the link at `path`; `None` when it is no link.
    pub fn link(&self, path: &str) -> Result<Option<String>> {
        match self.walk(path, false)? {
            Some((path, Node::Link)) => {
                let (volume, rest) = self.place(&path)?;
                volume.link(rest).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// The sorted names in the folder at `path`; empty when there is none.
    pub fn names(&self, path: &str) -> Result<Vec<String>> {
        let Some((path, Node::Folder)) = self.walk(path, true)? else { return Ok(Vec::new()) };
        let (volume, rest) = self.place(&path)?;
        let mut names = volume.names(rest)?;
        names.sort();
        Ok(names)
    }

    /// The paths of the files (links included) in the folder at `path` whose names end with `suffix`.
    pub fn files(&self, path: &str, suffix: &str) -> Result<Vec<String>> {
        let names = self.names(path)?;
        Ok(names.iter().filter(|name| name.ends_with(suffix)).map(|name| format!("{path}/{name}")).collect())
    }

    /// The content of the file at `path`, as a stream; `None` when there is no regular file.
    pub fn open(&self, path: &str) -> Result<Option<Box<dyn Read + '_>>> {
        let Some((path, Node::File(_))) = self.walk(path, true)? else { return Ok(None) };
        // The volume is owned by the tree, the path is not: find the volume again by its point.
        let point = self.point_of(&path);
        match self.volumes.get(point) {
            Some(volume) => volume.open(&path[point.len()..]).map(Some),
            None => Ok(None),
        }
    }

    fn point_of<'a>(&self, path: &'a str) -> &'a str {
        let points = self.volumes.keys().rev();
        let lengths = points.filter(|point| is_below(path, point));
        &path[..lengths.map(String::len).next().unwrap_or(0)]
    }

    /// The text of the file at `path`: `None` when there is none or it is not UTF-8. Fails when it is longer
    /// than [`MAX_TEXT`].
    pub fn text(&self, path: &str) -> Result<Option<String>> {
        if let Some(Node::File(size)) = self.node(path)?
            && size > MAX_TEXT
        {
            return Err(Error::new(
                Kind::Image,
                "guest.file-too-long",
                format!("cannot read the guest's {path}"),
            )
            .because(format!("it has {size} bytes; more than {MAX_TEXT} is no configuration file"))
            .fact("path", path));
        }
        let Some(stream) = (match self.open(path) {
            Err(error) if error.id() == "guest.path" => None,
            opened => opened?,
        }) else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        stream.take(MAX_TEXT).read_to_end(&mut bytes).map_err(|error| {
            Error::new(Kind::Image, "guest.read", format!("cannot read the guest's {path}"))
                .fact("path", path)
                .caused_by(error)
        })?;
        Ok(String::from_utf8(bytes).ok())
    }
}

/// Whether `path` is the folder `point`, or below it.
fn is_below(path: &str, point: &str) -> bool {
    let rest = path.strip_prefix(point.trim_end_matches('/'));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The mount that the file at `path`, no link on the way, lies in: of those above it the one with the longest point.
pub fn mount_of<'m, M>(mounts: &'m [M], point: impl Fn(&M) -> &str, path: &str) -> Option<&'m M> {
    mounts.iter().filter(|mount| is_below(path, point(mount))).max_by_key(|mount| point(mount).len())
}

/// The names of a path, last first, without `.` and empty ones.
fn components(path: &str) -> Vec<String> {
    path.rsplit('/').filter(|name| !name.is_empty() && *name != ".").map(str::to_owned).collect()
}

fn bad_path(path: &str, why: &str) -> Error {
    let shown: String = path.chars().take(200).collect();
    Error::new(Kind::Image, "guest.path", format!("cannot follow the guest's {shown}")).because(why)
}

/// A file system made from text: for tests, and for trees that never were on a disk.
#[derive(Clone, Default)]
pub struct TextVolume {
    entries: BTreeMap<String, TextEntry>,
}

#[derive(Clone)]
enum TextEntry {
    File(Vec<u8>),
    Link(String),
}

impl TextVolume {
    /// Adds a file, and the folders above it.
    #[must_use]
    pub fn file(mut self, path: &str, content: impl Into<Vec<u8>>) -> Self {
        self.entries.insert(path.to_owned(), TextEntry::File(content.into()));
        self
    }

    /// Adds a link, and the folders above it.
    #[must_use]
    pub fn symlink(mut self, path: &str, target: &str) -> Self {
        self.entries.insert(path.to_owned(), TextEntry::Link(target.to_owned()));
        self
    }

    /// Takes a file or link away.
    pub fn remove(&mut self, path: &str) {
        self.entries.remove(path);
    }
}

impl Volume for TextVolume {
    fn node(&self, path: &str) -> Result<Option<Node>> {
        let folder = format!("{}/", path.trim_end_matches('/'));
        Ok(match self.entries.get(path) {
            Some(TextEntry::File(content)) => Some(Node::File(content.len() as u64)),
            Some(TextEntry::Link(_)) => Some(Node::Link),
            None if self
                .entries
                .range(folder.clone()..)
                .next()
                .is_some_and(|(p, _)| p.starts_with(&folder)) =>
            {
                Some(Node::Folder)
            }
            None => None,
        })
    }

    fn link(&self, path: &str) -> Result<String> {
        match self.entries.get(path) {
            Some(TextEntry::Link(target)) => Ok(target.clone()),
            _ => Err(bad_path(path, "it is no link")),
        }
    }

    fn names(&self, path: &str) -> Result<Vec<String>> {
        let folder = format!("{}/", path.trim_end_matches('/'));
        let below = self.entries.range(folder.clone()..).take_while(|(path, _)| path.starts_with(&folder));
        let mut names: Vec<String> =
            below.filter_map(|(path, _)| path[folder.len()..].split('/').next().map(str::to_owned)).collect();
        names.dedup();
        Ok(names)
    }

    fn open(&self, path: &str) -> Result<Box<dyn Read + '_>> {
        match self.entries.get(path) {
            Some(TextEntry::File(content)) => Ok(Box::new(content.as_slice())),
            _ => Err(bad_path(path, "it is no file")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        let root = TextVolume::default()
            .file("/etc/fstab", "root")
            .file("/usr/lib/os-release", "ID=debian\n")
            .symlink("/etc/os-release", "../usr/lib/os-release")
            .symlink("/etc/absolute", "/usr/lib/os-release")
            .symlink("/etc/escape", "../../../../usr/lib/os-release")
            .symlink("/etc/loop", "loop")
            .symlink("/etc/ping", "pong")
            .symlink("/etc/pong", "ping")
            .symlink("/etc/dangling", "/nowhere")
            .symlink("/lib", "usr/lib")
            .symlink("/b", "boot/grub");
        let boot = TextVolume::default().file("/grub/grub.cfg", "menu").symlink("/up", "../etc/fstab");
        let mut tree = Tree::new(Box::new(root));
        tree.mount("/boot", Box::new(boot));
        tree
    }

    #[test]
    fn links_resolve_inside_the_guest_only() {
        let tree = tree();
        for path in
            ["/etc/os-release", "/etc/absolute", "/etc/escape", "/lib/os-release", "/../lib/os-release"]
        {
            assert_eq!(tree.text(path).unwrap().as_deref(), Some("ID=debian\n"), "{path}");
        }
    }

    #[test]
    fn links_that_lead_in_circles_or_nowhere_are_nothing() {
        let tree = tree();
        for path in ["/etc/loop", "/etc/ping", "/etc/dangling", "/etc/fstab/below", "/etc/loop/below"] {
            assert_eq!(tree.text(path).unwrap(), None, "{path}");
            assert!(!tree.exists(path).unwrap(), "{path}");
        }
        assert_eq!(tree.resolve("/etc/loop").unwrap_err().id(), "guest.path");
    }

    #[test]
    fn paths_and_links_cross_the_guests_mounts() {
        let tree = tree();
        assert_eq!(tree.text("/boot/grub/grub.cfg").unwrap().as_deref(), Some("menu"));
        assert_eq!(tree.text("/b/grub.cfg").unwrap().as_deref(), Some("menu"));
        assert_eq!(tree.text("/boot/up").unwrap().as_deref(), Some("root"));
        assert_eq!(tree.resolve("/b/grub.cfg").unwrap().as_deref(), Some("/boot/grub/grub.cfg"));
        assert_eq!(tree.names("/boot").unwrap(), ["grub", "up"]);
        assert_eq!(tree.link("/etc/absolute").unwrap().as_deref(), Some("/usr/lib/os-release"));
    }

    #[test]
    fn a_file_too_long_for_a_configuration_is_refused_before_it_is_read() {
        let tree = Tree::new(Box::new(TextVolume::default().file("/etc/fstab", vec![b'#'; 10 << 20])));
        assert_eq!(tree.text("/etc/fstab").unwrap_err().id(), "guest.file-too-long");
    }
}
