//! A config drive: the small disk from which cloud-init learns who the machine is. An ISO 9660 volume labelled
//! `config-2` with OpenStack's files (docs.openstack.org/nova, "Config drives"; cloud-init's ConfigDrive source).
//!
//! The volume is plain ISO 9660, level 2 (ECMA-119): Linux shows its upper-case names in lower case.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use crate::error::{Error, Kind, Result};
use crate::unit::to_usize;

/// A logical sector of ISO 9660, in bytes.
const SECTOR: usize = 2048;

/// Most bytes of all files together.
const MAX_CONTENT: usize = 16 << 20;

/// What an instance is told.
#[derive(Clone, Debug, Default)]
pub struct ConfigDrive {
    /// Its id: a new one makes cloud-init treat the boot as a first one.
    pub instance_id: String,
    /// Its host name; none leaves the guest's own.
    pub hostname: Option<String>,
    /// Public keys for the default user.
    pub public_keys: Vec<String>,
    /// Its network cards' addresses; each is to use DHCP.
    pub macs: Vec<[u8; 6]>,
    /// A script or cloud-config for cloud-init.
    pub user_data: Option<String>,
    /// A crypt(3) hash for root, as a forced import has it: in `qcloud_action/os.conf`.
    pub password: Option<String>,
}

impl ConfigDrive {
    /// The disk's content.
    pub fn iso(&self) -> Result<Vec<u8>> {
        let keys: BTreeMap<String, &String> =
            self.public_keys.iter().enumerate().map(|(i, key)| (format!("key{i}"), key)).collect();
        let mut meta = json!({ "uuid": self.instance_id, "public_keys": keys });
        if let Some(name) = &self.hostname {
            meta["hostname"] = json!(name);
            meta["name"] = json!(name);
        }
        let links: Vec<_> = (0..)
            .zip(&self.macs)
            .map(|(i, mac)| {
                let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
                json!({ "id": format!("eth{i}"), "type": "phy", "ethernet_mac_address": mac, "mtu": null })
            })
            .collect();
        let networks: Vec<_> = (0..self.macs.len())
            .map(|i| {
                let link = format!("eth{i}");
                json!({ "id": format!("network{i}"), "type": "ipv4_dhcp", "link": link, "network_id": link })
            })
            .collect();
        let network = json!({ "links": links, "networks": networks, "services": [] });
        let (meta, network) = (meta.to_string(), network.to_string());
        let mut files = vec![
            ("openstack/latest/meta_data.json", meta.as_bytes()),
            ("openstack/latest/network_data.json", network.as_bytes()),
        ];
        if let Some(data) = &self.user_data {
            files.push(("openstack/latest/user_data", data.as_bytes()));
        }
        let conf = self.password.as_ref().map(|password| format!("password={password}\n"));
        if let Some(conf) = &conf {
            files.push(("qcloud_action/os.conf", conf.as_bytes()));
        }
        iso9660("config-2", &files)
    }
}

/// A folder or file of the volume, and where its content lies.
struct Node {
    /// Index of the folder it is in; the root's is its own.
    parent: usize,
    name: String,
    content: Option<Vec<u8>>,
    sector: u32,
    len: u32,
}

impl Node {
    fn is_folder(&self) -> bool {
        self.content.is_none()
    }
}

/// An ISO 9660 volume of `files`, whose names are relative paths of lower-case letters, digits, `_` and one `.`.
pub fn iso9660(label: &str, files: &[(&str, &[u8])]) -> Result<Vec<u8>> {
    let refused =
        |why: String| Error::new(Kind::Usage, "boot.config-drive", "cannot make a config drive").because(why);
    if files.iter().map(|(_, content)| content.len()).sum::<usize>() > MAX_CONTENT {
        return Err(refused(format!("its files are larger than {MAX_CONTENT} bytes together")));
    }
    if label.len() > 32 || !label.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(refused(format!("{label:?} is no label")));
    }
    let mut nodes = tree(files).ok_or_else(|| refused("a file's name does not fit ISO 9660".into()))?;

    // Sectors: 16 unused, the volume's two descriptors, the path table in both byte orders, folders, files.
    let (path_little, path_big) = (18, 19);
    let mut sector = 20;
    for i in 0..nodes.len() {
        let len = match &nodes[i].content {
            Some(content) => content.len(),
            None => records(&nodes, i).iter().map(Vec::len).sum(),
        };
        if nodes[i].is_folder() && len > SECTOR {
            return Err(refused("a folder holds too many files".into()));
        }
        let len = if nodes[i].is_folder() { SECTOR } else { len };
        nodes[i].sector = sector;
        nodes[i].len = u32::try_from(len).map_err(|_| refused("a file is too large".into()))?;
        sector += nodes[i].len.div_ceil(2048).max(1);
    }

    let mut image = vec![0; to_usize(u64::from(sector)) * SECTOR];
    let mut put = |sector: u32, bytes: &[u8]| {
        let at = to_usize(u64::from(sector)) * SECTOR;
        image[at..at + bytes.len()].copy_from_slice(bytes);
    };
    let little = path_table(&nodes, u32::to_le_bytes, u16::to_le_bytes);
    put(path_little, &little);
    put(path_big, &path_table(&nodes, u32::to_be_bytes, u16::to_be_bytes));
    let table_len = u32::try_from(little.len()).map_err(|_| refused("too many folders".into()))?;
    put(16, &descriptor(label, sector, table_len, path_little, path_big, &record(&nodes[0], b"\0")));
    put(17, b"\xffCD001\x01");
    for i in 0..nodes.len() {
        match &nodes[i].content {
            Some(content) => put(nodes[i].sector, content),
            None => put(nodes[i].sector, &records(&nodes, i).concat()),
        }
    }
    Ok(image)
}

/// The folders, parents first and siblings in order as the path table wants them, then the files.
fn tree(files: &[(&str, &[u8])]) -> Option<Vec<Node>> {
    let node = |parent, name: &str, content| {
        let name = name.to_ascii_uppercase();
        Node { parent, name, content, sector: 0, len: 0 }
    };
    let folders: BTreeSet<(usize, &str)> = files
        .iter()
        .flat_map(|(path, _)| {
            path.match_indices('/').map(|(at, _)| (path[..at].matches('/').count(), &path[..at]))
        })
        .collect();
    let mut nodes = vec![node(0, "", None)];
    let mut places = BTreeMap::from([("", 0)]);
    for (_, path) in folders {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let fits = !name.is_empty() && name.len() <= 31 && name.bytes().all(is_name_byte);
        nodes.push(node(*places.get(parent).filter(|_| fits)?, name, None));
        places.insert(path, nodes.len() - 1);
    }
    let mut seen = BTreeSet::new();
    for (path, content) in files {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let (stem, extension) = name.split_once('.').unwrap_or((name, ""));
        let fits =
            !stem.is_empty() && name.len() <= 30 && stem.bytes().chain(extension.bytes()).all(is_name_byte);
        let new = fits && !places.contains_key(path) && seen.insert(path);
        // A file's name always has a dot and a version.
        let name = format!("{stem}.{extension};1");
        nodes.push(node(*places.get(parent).filter(|_| new)?, &name, Some(content.to_vec())));
    }
    Some(nodes)
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_'
}

/// A folder's records: itself, its parent, then what is in it by name (ECMA-119 9.3).
fn records(nodes: &[Node], folder: usize) -> Vec<Vec<u8>> {
    let mut inside: Vec<&Node> = nodes.iter().skip(1).filter(|node| node.parent == folder).collect();
    inside.sort_by(|a, b| a.name.cmp(&b.name));
    let mut records = vec![record(&nodes[folder], b"\0"), record(&nodes[nodes[folder].parent], b"\x01")];
    records.extend(inside.into_iter().map(|node| record(node, node.name.as_bytes())));
    records
}

/// A number in both byte orders (ECMA-119 7.3.3).
fn both(n: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    bytes[4..].copy_from_slice(&n.to_be_bytes());
    bytes
}

/// A directory record (ECMA-119 9.1), dated 1 January 2000.
fn record(node: &Node, name: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0];
    bytes.extend(both(node.sector));
    bytes.extend(both(node.len));
    bytes.extend([100, 1, 1, 0, 0, 0, 0]);
    bytes.extend([if node.is_folder() { 2 } else { 0 }, 0, 0]);
    bytes.extend([1, 0, 0, 1]);
    // Names have at most 32 bytes (`tree`), so a record has at most 66.
    bytes.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
    bytes.extend(name);
    if bytes.len() % 2 == 1 {
        bytes.push(0);
    }
    bytes[0] = u8::try_from(bytes.len()).unwrap_or(u8::MAX);
    bytes
}

/// The path table (ECMA-119 9.4): every folder, by depth, its parent, its name.
fn path_table(nodes: &[Node], long: fn(u32) -> [u8; 4], short: fn(u16) -> [u8; 2]) -> Vec<u8> {
    let mut table = Vec::new();
    for node in nodes.iter().filter(|node| node.is_folder()) {
        let name = if node.name.is_empty() { b"\0" } else { node.name.as_bytes() };
        table.extend([u8::try_from(name.len()).unwrap_or(u8::MAX), 0]);
        table.extend(long(node.sector));
        table.extend(short(u16::try_from(node.parent + 1).unwrap_or(u16::MAX)));
        table.extend(name);
        if name.len() % 2 == 1 {
            table.push(0);
        }
    }
    table
}

/// The primary volume descriptor (ECMA-119 8.4).
fn descriptor(label: &str, sectors: u32, table_len: u32, little: u32, big: u32, root: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; SECTOR];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"\x01CD001\x01");
    put(8, &[b' '; 64]);
    put(40, label.as_bytes());
    put(80, &both(sectors));
    put(120, &[1, 0, 0, 1]); // volumes in the set
    put(124, &[1, 0, 0, 1]); // this one's number
    put(128, &[0, 8, 8, 0]); // the sector size
    put(132, &both(table_len));
    put(140, &little.to_le_bytes());
    put(148, &big.to_be_bytes());
    put(156, root);
    put(190, &[b' '; 623]); // set, publisher, preparer, application, files: none
    for at in [813, 830, 847, 864] {
        put(at, b"0000000000000000\0"); // dates: none
    }
    put(881, &[1]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_do_not_fit_are_refused() {
        for name in ["", "a/", "/a", "a.b.c", "A", "../x", "a-b", "x".repeat(31).as_str(), "a/b/"] {
            let error = iso9660("config-2", &[(name, b"x")]).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{name}");
        }
        assert!(iso9660("config-2", &[("a", b"1"), ("a", b"2")]).is_err());
        assert!(iso9660("config-2", &[("a", b"1"), ("a/b", b"2")]).is_err());
        assert!(iso9660(&"x".repeat(33), &[]).is_err());
    }

    #[test]
    fn the_volume_is_named_and_whole_sectors_long() {
        let image = ConfigDrive { instance_id: "i-1".into(), ..ConfigDrive::default() }.iso().unwrap();
        assert_eq!(image.len() % SECTOR, 0);
        assert_eq!(&image[16 * SECTOR + 40..][..9], b"config-2 ");
    }
}
