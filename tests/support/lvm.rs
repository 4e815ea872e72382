//! Volume groups on loop devices, made by the real LVM without device-mapper, and metadata written by hand where LVM
//! would refuse to.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use haul::unit::{Extent, ExtentMap};
use tempfile::TempDir;

use crate::support::{LoopDevice, run, text, try_run};

/// Disk images whose parts are attached to loop devices, and LVM's tools for these devices only.
pub struct Lvm {
    dir: TempDir,
    devices: Vec<(LoopDevice, PathBuf, Extent)>,
}

/// Bytes of a logical volume that lie together: offset in it, image and offset there, length.
pub struct Place {
    pub offset: u64,
    pub disk: PathBuf,
    pub at: u64,
    pub len: u64,
}

/// Rows of one of LVM's reports.
type Rows = Vec<BTreeMap<String, String>>;

impl Lvm {
    /// Attaches these parts of images.
    pub fn attach(parts: &[(&Path, Extent)]) -> Lvm {
        let attach = |(image, extent): &(&Path, Extent)| {
            let (offset, len) = (extent.start.to_string(), extent.len().to_string());
            let out = run("losetup", &["-f", "--show", "-o", &offset, "--sizelimit", &len, text(image)]);
            (LoopDevice { path: PathBuf::from(out.trim()) }, image.to_path_buf(), *extent)
        };
        Lvm { dir: tempfile::tempdir().unwrap(), devices: parts.iter().map(attach).collect() }
    }

    /// The device of part `i`.
    pub fn device(&self, i: usize) -> &str {
        text(&self.devices[i].0.path)
    }

    /// Runs one of LVM's commands on these devices; `$0` stands for the first of them, and so on.
    pub fn run(&self, command: &str) -> String {
        let (code, out, err) = self.try_run(command);
        assert_eq!(code, 0, "{command}: {out}{err}");
        out
    }

    fn try_run(&self, command: &str) -> (i32, String, String) {
        let accept: String =
            self.devices.iter().map(|(dev, ..)| format!("\"a|^{}$|\",", text(&dev.path))).collect();
        // Without activation no device-mapper is needed.
        let config = format!(
            "devices {{ dir=\"/dev\" scan=\"/dev\" use_devicesfile=0 hints=\"none\" filter=[{accept}\"r|.*|\"] \
             obtain_device_list_from_udev=0 external_device_info_source=\"none\" }} \
             activation {{ udev_sync=0 udev_rules=0 monitoring=0 }} \
             global {{ activation=0 use_lvmpolld=0 use_lvmlockd=0 }} backup {{ backup=0 archive=0 }}"
        );
        let system = format!("LVM_SYSTEM_DIR={}", text(self.dir.path()));
        let mut command = command.to_owned();
        for (i, (dev, ..)) in self.devices.iter().enumerate() {
            command = command.replace(&format!("${i}"), text(&dev.path));
        }
        let fixed = [&*system, "LVM_SUPPRESS_FD_WARNINGS=1", "DM_DISABLE_UDEV=1"];
        let words = command.split(' ').chain(["--config", &config]);
        try_run("env", &fixed.into_iter().chain(words).collect::<Vec<_>>())
    }

    /// Makes every part a physical volume with `options` and puts them into group `name`, made with more options.
    pub fn group(&self, name: &str, pv_options: &str, vg_options: &str) {
        let devices: Vec<&str> = (0..self.devices.len()).map(|i| self.device(i)).collect();
        let devices = devices.join(" ");
        self.run(format!("pvcreate -q {pv_options} {devices}").replace("  ", " ").as_str());
        self.run(format!("vgcreate -q {vg_options} {name} {devices}").replace("  ", " ").as_str());
    }

    /// Makes a logical volume; the options say how large it is, and where.
    pub fn create(&self, name: &str, options: &str) {
        self.run(&format!("lvcreate -q -an -Zn -Wn -n {name} {options}"));
    }

    /// Adds volumes to a group by editing its metadata as text, as LVM itself reads and writes it.
    pub fn edit(&self, group: &str, edit: impl FnOnce(String) -> String) {
        let path = self.dir.path().join("backup");
        self.run(&format!("vgcfgbackup -q -f {} {group}", text(&path)));
        fs::write(&path, edit(fs::read_to_string(&path).unwrap())).unwrap();
        self.run(&format!("vgcfgrestore -q --force -f {} {group}", text(&path)));
    }

    fn report(&self, command: &str) -> Rows {
        let out = self.run(&format!("{command} --reportformat json --units b --nosuffix"));
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        let reports = json["report"].as_array().unwrap()[0].as_object().unwrap();
        serde_json::from_value(reports.values().next().unwrap().clone()).unwrap()
    }

    /// The part behind a device, and where its physical extents begin.
    fn part(&self, device: &str) -> (&Path, u64) {
        let (_, image, extent) = self.devices.iter().find(|(dev, ..)| text(&dev.path) == device).unwrap();
        let rows = self.report("pvs -o pv_name,pe_start");
        let row = rows.iter().find(|row| row["pv_name"] == device).unwrap();
        (image, extent.start + row["pe_start"].parse::<u64>().unwrap())
    }

    /// Where every linear or striped volume of a group lies, as `lvs` tells.
    pub fn places(&self, group: &str) -> BTreeMap<String, Vec<Place>> {
        let number = |row: &BTreeMap<String, String>, name: &str| row[name].parse::<u64>().unwrap();
        let fields = "lv_name,segtype,seg_start,seg_size,seg_pe_ranges,stripe_size,vg_extent_size";
        let mut places: BTreeMap<String, Vec<Place>> = BTreeMap::new();
        for row in self.report(&format!("lvs -a -o {fields} {group}")) {
            if !["linear", "striped"].contains(&row["segtype"].as_str()) {
                continue;
            }
            let (start, size, extent) =
                (number(&row, "seg_start"), number(&row, "seg_size"), number(&row, "vg_extent_size"));
            let areas: Vec<(&Path, u64)> = row["seg_pe_ranges"]
                .split(' ')
                .map(|range| {
                    let (device, range) = range.rsplit_once(':').unwrap();
                    let first: u64 = range.split_once('-').unwrap().0.parse().unwrap();
                    let (image, at) = self.part(device);
                    (image, at + first * extent)
                })
                .collect();
            let chunk = if areas.len() > 1 { number(&row, "stripe_size") } else { size };
            let name = row["lv_name"].trim_matches(['[', ']']).to_owned();
            for i in 0..size / chunk {
                let (disk, at) = areas[usize::try_from(i).unwrap() % areas.len()];
                let at = at + i / areas.len() as u64 * chunk;
                let place = Place { offset: start + i * chunk, disk: disk.to_owned(), at, len: chunk };
                places.entry(name.clone()).or_default().push(place);
            }
        }
        places
    }

    /// The free extents on `disk`, as `pvs` tells.
    pub fn free(&self, disk: &Path) -> ExtentMap {
        let mut free = ExtentMap::new();
        for row in self.report("pvs --segments -o pv_name,pvseg_start,pvseg_size,segtype,vg_extent_size") {
            let (image, at) = self.part(&row["pv_name"]);
            if row["segtype"] == "free" && image == disk {
                let [start, count, size] = ["pvseg_start", "pvseg_size", "vg_extent_size"]
                    .map(|name| row[name].parse::<u64>().unwrap());
                free.insert(Extent::at(at + start * size, count * size));
            }
        }
        free
    }
}

/// Writes a volume's bytes where they belong.
pub fn write(places: &[Place], bytes: &[u8]) {
    for place in places {
        let file = File::options().write(true).open(&place.disk).unwrap();
        let from = usize::try_from(place.offset).unwrap();
        file.write_all_at(&bytes[from..from + usize::try_from(place.len).unwrap()], place.at).unwrap();
    }
}

/// Where bytes of a volume lie on `disk`.
pub fn translate(places: &[Place], set: &ExtentMap, disk: &Path) -> ExtentMap {
    let mut there = ExtentMap::new();
    for place in places.iter().filter(|place| place.disk == disk) {
        for run in set.within(Extent::at(place.offset, place.len)) {
            there.insert(Extent::at(run.start - place.offset + place.at, run.len()));
        }
    }
    there
}

/// LVM's checksum, bit by bit.
pub fn crc(bytes: &[u8]) -> u32 {
    let mut crc = 0xf597_a6cf_u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    crc
}

/// Where the metadata area of [`physical_volume`] begins, and where its text does.
pub const AREA: usize = 4096;
pub const TEXT: usize = AREA + 512;

/// The first `data` bytes of a physical volume of `size` bytes with this metadata text.
pub fn physical_volume(uuid: &str, size: u64, data: usize, metadata: &str) -> Vec<u8> {
    let mut pv = vec![0; data];
    let label = &mut pv[512..1024];
    label[..8].copy_from_slice(b"LABELONE");
    label[8..16].copy_from_slice(&1_u64.to_le_bytes());
    label[20..24].copy_from_slice(&32_u32.to_le_bytes());
    label[24..32].copy_from_slice(b"LVM2 001");
    label[32..64].copy_from_slice(uuid.replace('-', "").as_bytes());
    let numbers = [size, data as u64, 0, 0, 0, AREA as u64, (data - AREA) as u64];
    for (i, number) in numbers.into_iter().enumerate() {
        label[64 + i * 8..][..8].copy_from_slice(&number.to_le_bytes());
    }
    let header = &mut pv[AREA..TEXT];
    header[4..20].copy_from_slice(b" LVM2 x[5A%r0N*>");
    header[20..24].copy_from_slice(&1_u32.to_le_bytes());
    for (i, number) in [AREA as u64, (data - AREA) as u64, 512, metadata.len() as u64].into_iter().enumerate()
    {
        header[24 + i * 8..][..8].copy_from_slice(&number.to_le_bytes());
    }
    pv[TEXT..TEXT + metadata.len()].copy_from_slice(metadata.as_bytes());
    seal(&mut pv);
    pv
}

/// Makes every checksum of such a volume fit, whatever the rest says.
pub fn seal(pv: &mut [u8]) {
    let put = |pv: &mut [u8], at: usize, sum: u32| pv[at..at + 4].copy_from_slice(&sum.to_le_bytes());
    let number = |at: usize| u64::from_le_bytes(pv[at..at + 8].try_into().unwrap());
    let (offset, len) = (number(AREA + 40), number(AREA + 48));
    let start = (AREA as u64).saturating_add(offset);
    let inside = start.checked_add(len).filter(|end| *end <= pv.len() as u64);
    if let Some(end) = inside {
        let sum = crc(&pv[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()]);
        put(pv, AREA + 56, sum);
    }
    let sum = crc(&pv[AREA + 4..TEXT]);
    put(pv, AREA, sum);
    let sum = crc(&pv[512 + 20..1024]);
    put(pv, 512 + 16, sum);
}
