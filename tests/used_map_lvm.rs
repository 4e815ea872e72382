//! Used maps of physical volumes and the logical volumes read through them, judged by LVM's own tools, e2fsprogs and the
//! kernel. Needs root for loop devices, and no device-mapper.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test: a failure is the finding"
)]
#![allow(clippy::cast_possible_truncation, reason = "sizes of test files")]

#[path = "support/allocations.rs"]
mod allocations;
#[path = "support/bounds.rs"]
mod bounds;
#[path = "used_map_lvm/damage.rs"]
mod damage;
#[path = "support/lvm.rs"]
mod lvm;
mod support;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use haul::io::{DataOf, DiskFile, ReadAt};
use haul::layout::{self, Usage, UsedMap};
use haul::unit::{Extent, ExtentMap, MIB, extents};
use lvm::{AREA, Lvm, Place, TEXT, translate, write};
use support::{LoopMount, Random, age, empty_image, run, text, try_run};
use tempfile::TempDir;

fn open(image: &Path) -> UsedMap {
    layout::used_map(Arc::new(DiskFile::open(image).unwrap())).unwrap()
}

fn assert_whole(volume: &layout::Volume, why: &str) {
    let Usage::Whole { reason } = &volume.usage else { panic!("{volume:?} is mapped") };
    assert!(reason.contains(why), "{reason}");
}

/// What is in `size` bytes but not in `set`.
fn rest(set: &ExtentMap, size: u64) -> ExtentMap {
    let mut rest: ExtentMap = [Extent::new(0, size)].into_iter().collect();
    set.iter().for_each(|run| rest.remove(run));
    rest
}

fn unused(map: &UsedMap, size: u64) -> ExtentMap {
    rest(&extents::collect(map, Extent::new(0, size)).unwrap(), size)
}

/// The free bytes of an ext image by dumpe2fs's lists.
fn dumpe2fs_free(image: &Path) -> ExtentMap {
    let out = run("dumpe2fs", &[text(image)]);
    let number = |line: &str| line.split(':').nth(1).unwrap().trim().parse::<u64>().unwrap();
    let block = out.lines().find(|line| line.starts_with("Block size:")).map(number).unwrap();
    let mut free = ExtentMap::new();
    for list in out.lines().filter_map(|line| line.strip_prefix("  Free blocks: ")) {
        for run in list.split(',').map(str::trim).filter(|run| !run.is_empty()) {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
            free.insert(Extent::new(first * block, (last + 1) * block));
        }
    }
    free
}

/// A disk of `mib` MiB partitioned into `parts`, given as start and length in MiB.
fn disk(path: &Path, mib: u64, parts: &[(u64, u64)]) -> Vec<Extent> {
    empty_image(path, mib * MIB);
    let lines: String =
        parts.iter().map(|(start, len)| format!("start={start}MiB, size={len}MiB\n")).collect();
    let script = path.with_extension("sfdisk");
    fs::write(&script, format!("label: gpt\n{lines}")).unwrap();
    run("sh", &["-c", &format!("sfdisk -q --no-reread {} < {}", text(path), text(&script))]);
    parts.iter().map(|(start, len)| Extent::at(start * MIB, len * MIB)).collect()
}

/// A file system, its bytes and what is free in it.
struct Content {
    bytes: Vec<u8>,
    free: ExtentMap,
}

/// Makes the content of a volume of `size` bytes: `swap`, `junk`, or what an mkfs command makes of it, with files.
fn content(dir: &Path, size: u64, kind: &str, random: &mut Random) -> Content {
    let image = dir.join("content");
    empty_image(&image, size);
    let free = match kind {
        "swap" => {
            run("mkswap", &["-q", text(&image)]);
            [Extent::new(4096, size)].into_iter().collect()
        }
        "junk" => {
            fs::write(&image, random.bytes(size as usize)).unwrap();
            ExtentMap::new()
        }
        command => {
            let mut words = command.split(' ');
            let program = words.next().unwrap();
            run(program, &words.chain(["-q", "-F", text(&image)]).collect::<Vec<_>>());
            let mount = LoopMount::new(&image, "");
            age(mount.path(), random.next(), 60, size / 120);
            drop(mount);
            dumpe2fs_free(&image)
        }
    };
    let bytes = fs::read(&image).unwrap();
    fs::remove_file(&image).unwrap();
    Content { bytes, free }
}

fn len(places: &[Place]) -> u64 {
    places.iter().map(|place| place.len).sum()
}

/// Fills free extents with what is left of deleted volumes.
fn fill(disk: &Path, free: &ExtentMap, random: &mut Random) {
    let file = File::options().write(true).open(disk).unwrap();
    for run in free.iter() {
        file.write_all_at(&random.bytes(run.len() as usize), run.start).unwrap();
    }
}

/// The copy haul would make: used bytes, the rest zero.
fn masked_copy(image: &Path, copy: &Path) {
    let disk = DiskFile::open(image).unwrap();
    empty_image(copy, disk.size());
    let out = File::options().write(true).open(copy).unwrap();
    for run in extents::collect(&open(image), Extent::new(0, disk.size())).unwrap().iter() {
        let mut bytes = vec![0; run.len() as usize];
        disk.read_at(&mut bytes, run.start).unwrap();
        out.write_all_at(&bytes, run.start).unwrap();
    }
}

/// Reads a logical volume through haul, `name` being `group/volume`.
fn read_logical(image: &Path, name: &str) -> Vec<u8> {
    let disk: Arc<dyn ReadAt> = Arc::new(DiskFile::open(image).unwrap());
    let found = layout::logical_volumes(&disk).unwrap();
    let volume = found.into_iter().find(|found| found.full_name() == name).unwrap().volume.unwrap();
    let mut bytes = vec![0; volume.size() as usize];
    volume.read_at(&mut bytes, 0).unwrap();
    let data = extents::collect(&DataOf(&*volume), Extent::new(0, volume.size())).unwrap();
    for (i, page) in bytes.chunks(4096).enumerate() {
        let is_zero = page.iter().all(|byte| *byte == 0);
        assert!(
            is_zero || data.covers(Extent::at(i as u64 * 4096, 4096)),
            "{name}: data at page {i} is not told"
        );
    }
    bytes
}

/// Options of pvcreate and vgcreate, then commands that make the volumes of group `vg` on two partitions.
const LAYOUTS: &[(&str, &str, &[&str])] = &[
    (
        "",
        "-s 4m",
        &[
            "root -L 24m vg $0",
            "swap -L 12m vg $0",
            "+root +L12m $0",
            "+root +L20m $1",
            "data -L 64m -i 2 -I 64k vg",
            "bare -L 8m vg",
        ],
    ),
    (
        "--pvmetadatacopies 2",
        "-s 384k",
        &[
            "bare -L 3m vg $1",
            "swap -L 8m -i 2 -I 128k vg",
            "root -L 40m -i 2 -I 4k vg",
            "data -L 30m vg $1",
            "+root +L9m $0 $1",
            "+data +L21m $0",
        ],
    ),
    (
        "--metadatasize 100k --dataalignment 64k",
        "-s 64k",
        &[
            "data -L 20m vg $1",
            "root -L 30m vg $0",
            "bare -L 64k vg",
            "swap -L 3m vg $1",
            "+root +L7m $1",
            "+data +L9m $1",
        ],
    ),
];

#[test]
fn logical_volumes_are_mapped_as_lvs_places_them_and_dumpe2fs_lists_them() {
    let dir = tempfile::tempdir().unwrap();
    let (image, copy) = (dir.path().join("disk"), dir.path().join("copy"));
    let mut random = Random::new(41);
    for (pv_options, vg_options, commands) in LAYOUTS {
        let parts = disk(&image, 250, &[(1, 8), (10, 120), (140, 100)]);
        let lvm = Lvm::attach(&[(&image, parts[1]), (&image, parts[2])]);
        lvm.group("vg", pv_options, vg_options);
        for command in *commands {
            match command.strip_prefix('+').and_then(|rest| rest.split_once(" +L")) {
                Some((name, more)) => {
                    let (more, devices) = more.split_once(' ').unwrap();
                    lvm.run(&format!("lvextend -q -L +{more} vg/{name} {devices}"));
                }
                None => {
                    let (name, options) = command.split_once(' ').unwrap();
                    lvm.create(name, options);
                }
            }
        }
        let places = lvm.places("vg");
        let mut expected = lvm.free(&image);
        drop(lvm);
        fill(&image, &expected, &mut random);
        let boot = content(dir.path(), parts[0].len(), "mkfs.ext4", &mut random);
        File::options().write(true).open(&image).unwrap().write_all_at(&boot.bytes, parts[0].start).unwrap();
        expected.extend(boot.free.iter().map(|run| run.shifted(parts[0].start)));
        let kinds = [
            ("bare", "junk"),
            ("data", "mkfs.ext3 -b 1024"),
            ("root", "mkfs.ext4 -b 4096"),
            ("swap", "swap"),
        ];
        let mut volumes = BTreeMap::new();
        for (name, kind) in kinds {
            let places = &places[name];
            let made = content(dir.path(), len(places), kind, &mut random);
            write(places, &made.bytes);
            expected.extend(translate(places, &made.free, &image).iter());
            volumes.insert(name, made);
        }

        let size = fs::metadata(&image).unwrap().len();
        let map = open(&image);
        let found = unused(&map, size);
        for run in found.iter() {
            assert!(expected.covers(run), "{vg_options}: somewhere in {run:?} bytes are lost");
        }
        assert_eq!(found, expected, "{vg_options}");
        assert_eq!(map.findings(), []);
        assert!(
            map.used_bytes().abs_diff(size - expected.bytes()) <= 4,
            "{vg_options}: rounded more than once a piece"
        );

        masked_copy(&image, &copy);
        for (name, volume) in &volumes {
            let full = format!("vg/{name}");
            let listed = map.volumes().iter().find(|volume| volume.logical.as_ref() == Some(&full)).unwrap();
            assert_eq!(listed.extent, Extent::new(0, volume.bytes.len() as u64));
            match (&listed.usage, *name) {
                (Usage::Whole { reason }, "bare") => assert!(reason.contains("unknown"), "{reason}"),
                (Usage::Mapped { used_bytes }, _) => {
                    assert_eq!(*used_bytes, volume.bytes.len() as u64 - volume.free.bytes(), "{full}");
                }
                other => panic!("{full}: {other:?}"),
            }
            assert!(read_logical(&image, &full) == volume.bytes, "{full}: other bytes are read");
            let copied = read_logical(&copy, &full);
            if let "data" | "root" = *name {
                let fs_image = dir.path().join("copied");
                fs::write(&fs_image, &copied).unwrap();
                let (code, out, _) = try_run("e2fsck", &["-fn", text(&fs_image)]);
                assert_eq!(code, 0, "{full}: {out}");
            }
        }
    }
}

#[test]
fn inspect_lists_physical_and_logical_volumes() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let parts = disk(&image, 40, &[(1, 30)]);
    let lvm = Lvm::attach(&[(&image, parts[0])]);
    lvm.group("vg-0", "", "-s 1m");
    lvm.create("root", "-L 9m vg-0");
    lvm.create("swap.1", "-L 4m vg-0");
    let uuid = lvm.run("pvs --noheadings -o pv_uuid").trim().to_owned();
    let places = lvm.places("vg-0");
    drop(lvm);
    let mut random = Random::new(3);
    let root = content(dir.path(), 9 * MIB, "mkfs.ext4 -L base", &mut random);
    write(&places["root"], &root.bytes);
    write(&places["swap.1"], &content(dir.path(), 4 * MIB, "swap", &mut random).bytes);

    let haul = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_haul")).args(args).arg(&image).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let json: serde_json::Value = serde_json::from_str(&haul(&["inspect", "--json"])).unwrap();
    let fields = ["partition", "logical_volume", "volume_group", "content", "label", "end"];
    let rows: Vec<Vec<serde_json::Value>> = json["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|volume| fields.map(|field| volume[field].clone()).to_vec())
        .collect();
    let expected = serde_json::json!([
        [1, null, "vg-0", "LVM2 physical volume", null, 31 * MIB],
        [null, "vg-0/root", null, "ext4", "base", 9 * MIB],
        [null, "vg-0/swap.1", null, "swap", null, 4 * MIB],
    ]);
    assert_eq!(serde_json::json!(rows), expected);
    assert_eq!(json["volumes"][0]["uuid"], uuid);
    assert_eq!(json["volumes"][0]["used_bytes"], MIB + 9 * MIB - root.free.bytes() + 4096);
    let printed = haul(&["inspect"]);
    for part in ["LVM2 physical volume", "of group vg-0", "vg-0/root", "vg-0/swap.1", "ext4"] {
        assert!(printed.contains(part), "no {part:?} in\n{printed}");
    }
}

/// A disk with two physical volumes, each of 19 extents of 1 MiB, and a group `vg` on them: `one` is linear and lies on
/// the first, `two` is striped over both; both hold file systems. Free extents hold junk.
struct Pair {
    dir: TempDir,
    image: PathBuf,
    parts: Vec<Extent>,
    lvm: Option<Lvm>,
    places: BTreeMap<String, Vec<Place>>,
}

const PAIR: u64 = 50;

impl Pair {
    fn new(pv_options: &str) -> Pair {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk");
        let parts = disk(&image, PAIR, &[(1, 20), (24, 20)]);
        let lvm = Lvm::attach(&[(&image, parts[0]), (&image, parts[1])]);
        lvm.group("vg", pv_options, "-s 1m");
        lvm.create("one", "-L 6m vg $0");
        lvm.create("two", "-L 8m -i 2 -I 32k vg");
        let places = lvm.places("vg");
        Pair { dir, image, parts, lvm: Some(lvm), places }
    }

    fn lvm(&self) -> &Lvm {
        self.lvm.as_ref().unwrap()
    }

    /// Fills the volumes called `one` and `two` and the free extents; LVM is done. Returns what is unused if both are
    /// mapped, each alone, and the free extents.
    fn fill(&mut self) -> [ExtentMap; 3] {
        let lvm = self.lvm.take().unwrap();
        let free = lvm.free(&self.image);
        drop(lvm);
        let mut random = Random::new(5);
        fill(&self.image, &free, &mut random);
        let [one, two] = ["one", "two"].map(|name| {
            let places = &self.places[name];
            let made = content(self.dir.path(), len(places), "mkfs.ext4 -b 1024", &mut random);
            write(places, &made.bytes);
            translate(places, &made.free, &self.image)
        });
        [one, two, free]
    }

    fn unused(&self) -> ExtentMap {
        unused(&open(&self.image), PAIR * MIB)
    }

    /// Asserts that both physical volumes are used whole, for a reason with `why` in it.
    fn assert_whole(&self, name: &str, why: &str) {
        let map = open(&self.image);
        for number in [1, 2] {
            let volume = map.volumes().iter().find(|volume| volume.partition == Some(number)).unwrap();
            let Usage::Whole { reason } = &volume.usage else { panic!("{name}: {volume:?}") };
            assert!(reason.contains(why), "{name}: {reason}");
        }
        assert_eq!(unused(&map, PAIR * MIB).bytes(), 0, "{name}");
    }
}

fn union(sets: &[&ExtentMap]) -> ExtentMap {
    sets.iter().flat_map(|set| set.iter()).collect()
}

/// The text of a logical volume.
fn lv(name: &str, status: &str, segment: &str) -> String {
    let mut id = name.replace(|c: char| !c.is_ascii_alphanumeric(), "x");
    id.push_str(&"A".repeat(32 - id.len()));
    let id = [&id[..6], &id[6..10], &id[10..14], &id[14..18], &id[18..22], &id[22..26], &id[26..]].join("-");
    let status = status.replace(' ', "\", \"");
    format!(
        "{name} {{\nid = \"{id}\"\nstatus = [\"{status}\"]\nflags = []\nsegment_count = 1\n\
         segment1 {{\nstart_extent = 0\n{segment}\n}}\n}}\n"
    )
}

fn linear(count: u64, pv: &str, first: u64) -> String {
    format!("extent_count = {count}\ntype = \"striped\"\nstripe_count = 1\nstripes = [\"{pv}\", {first}]")
}

const VISIBLE: &str = "READ WRITE VISIBLE";

#[test]
fn what_is_not_linear_or_striped_is_used_whole() {
    // Each adds volumes to extents 10 to 18 of both physical volumes; then come the names of those seen, and whether
    // `one` is still mapped.
    let cases: &[(&str, Vec<String>, &[&str], bool)] = &[
        (
            "snapshot",
            vec![
                lv("snap", VISIBLE, &linear(2, "pv0", 10)),
                lv(
                    "snapshot0",
                    VISIBLE,
                    "extent_count = 6\ntype = \"snapshot\"\nchunk_size = 8\norigin = \"one\"\ncow_store = \"snap\"",
                ),
            ],
            &["one", "two"],
            false,
        ),
        (
            "thin",
            vec![
                lv(
                    "pool",
                    VISIBLE,
                    "extent_count = 3\ntype = \"thin-pool\"\nmetadata = \"pool_tmeta\"\npool = \"pool_tdata\"\ntransaction_id = 1\nchunk_size = 128\ndiscards = \"passdown\"\nzero_new_blocks = 1",
                ),
                lv("pool_tmeta", "READ WRITE", &linear(2, "pv0", 10)),
                lv("pool_tdata", "READ WRITE", &linear(3, "pv1", 10)),
                lv("lvol0_pmspare", "READ WRITE", &linear(2, "pv1", 15)),
                lv(
                    "thin",
                    VISIBLE,
                    "extent_count = 100\ntype = \"thin\"\nthin_pool = \"pool\"\ntransaction_id = 0\ndevice_id = 1",
                ),
            ],
            &["one", "pool", "thin", "two"],
            true,
        ),
        (
            "mirror",
            vec![
                lv(
                    "mir",
                    VISIBLE,
                    "extent_count = 2\ntype = \"mirror\"\nmirror_count = 2\nregion_size = 1024\nmirrors = [\"mir_mimage_0\", 0, \"mir_mimage_1\", 0]",
                ),
                lv("mir_mimage_0", "READ WRITE", &linear(2, "pv0", 10)),
                lv("mir_mimage_1", "READ WRITE", &linear(2, "pv1", 10)),
            ],
            &["mir", "one", "two"],
            true,
        ),
        (
            "raid1",
            vec![
                lv(
                    "r",
                    VISIBLE,
                    "extent_count = 2\ntype = \"raid1\"\ndevice_count = 2\nregion_size = 1024\nraids = [\"r_rmeta_0\", \"r_rimage_0\", \"r_rmeta_1\", \"r_rimage_1\"]",
                ),
                lv("r_rmeta_0", "READ WRITE", &linear(1, "pv0", 10)),
                lv("r_rimage_0", "READ WRITE", &linear(2, "pv0", 11)),
                lv("r_rmeta_1", "READ WRITE", &linear(1, "pv1", 10)),
                lv("r_rimage_1", "READ WRITE", &linear(2, "pv1", 11)),
            ],
            &["one", "r", "two"],
            true,
        ),
    ];
    for (name, texts, names, one_is_mapped) in cases {
        let mut pair = Pair::new("");
        pair.lvm().edit("vg", |text| {
            text.replacen("logical_volumes {", &format!("logical_volumes {{\n{}", texts.concat()), 1)
        });
        pair.lvm().run("lvs -a vg");
        let taken = pair.lvm().free(&pair.image);
        let [one, two, free] = pair.fill();
        assert_eq!(free, taken);
        let expected = if *one_is_mapped { union(&[&one, &two, &free]) } else { union(&[&two, &free]) };
        assert_eq!(pair.unused(), expected, "{name}");
        let map = open(&pair.image);
        let mut seen: Vec<&str> = map.volumes().iter().filter_map(|v| v.logical.as_deref()).collect();
        seen.sort_unstable();
        assert_eq!(seen, names.iter().map(|name| format!("vg/{name}")).collect::<Vec<_>>(), "{name}");
        assert!(!free.is_empty() && free.bytes() < 24 * MIB, "{name}: {free:?}");
    }
}

#[test]
fn a_group_in_transition_or_on_loan_is_used_whole() {
    let exported = Pair::new("");
    exported.lvm().run("vgexport -q vg");
    exported.assert_whole("exported", "EXPORTED");

    let moving = Pair::new("");
    let mirror = "extent_count = 6\ntype = \"mirror\"\nmirror_count = 2\nregion_size = 1024\nextents_moved = 0\nmirrors = [\"pv0\", 0, \"pv1\", 10]";
    moving.lvm().edit("vg", |text| {
        let (before, after) = text.split_once("one {").unwrap();
        let after = after.replacen("\"VISIBLE\"", "\"VISIBLE\", \"LOCKED\"", 1).replacen(
            "\"pv0\", 0",
            "\"pvmove0\", 0",
            1,
        );
        let pvmove = lv("pvmove0", "READ WRITE PVMOVE LOCKED", mirror);
        format!("{before}{pvmove}one {{{after}")
    });
    moving.assert_whole("pvmove", "being moved");

    let shared = Pair::new("");
    shared.lvm().edit("vg", |text| {
        text.replacen("max_lv = 0", "max_lv = 0\nlock_type = \"sanlock\"\nlock_args = \"1.0.0:lvmlock\"", 1)
    });
    shared.assert_whole("shared", "shared with other machines");

    // One physical volume was away while the group changed.
    let mut missing = Pair::new("");
    missing.lvm = None;
    Lvm::attach(&[(&missing.image, missing.parts[0])]).run("lvremove -q -y vg/one");
    missing.assert_whole("missing", "MISSING");
}

#[test]
fn settings_that_move_no_bytes_leave_a_group_mapped() {
    let mut pair = Pair::new("");
    for command in [
        "vgchange -q --setautoactivation n vg",
        "vgchange -q --alloc anywhere -l 9 vg",
        "pvchange -q -x n --addtag rack/7 $1",
        "lvchange -q --setautoactivation n -ky --addtag a/b=c vg/two",
        "lvchange -q -pr --readahead 256 vg/one",
        "vgrename -q vg vg.new",
        "vgrename -q vg.new vg",
        "lvrename -q vg/one vg/1+",
        "lvrename -q vg/1+ vg/one",
    ] {
        pair.lvm().run(command);
    }
    let [one, two, free] = pair.fill();
    assert_eq!(pair.unused(), union(&[&one, &two, &free]));
}

#[test]
fn an_orphan_and_a_volume_with_parts_elsewhere_are_used_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (image, other) = (dir.path().join("disk"), dir.path().join("other"));
    let parts = disk(&image, 50, &[(1, 20), (24, 20)]);
    empty_image(&other, 20 * MIB);
    let lvm = Lvm::attach(&[(&image, parts[0]), (&other, Extent::new(0, 20 * MIB)), (&image, parts[1])]);
    lvm.run("pvcreate -q $0 $1 $2");
    lvm.run("vgcreate -q -s 1m vg $0 $1");
    lvm.create("here", "-L 5m vg $0");
    lvm.create("both", "-L 6m -i 2 -I 64k vg");
    lvm.create("there", "-L 4m vg $1");
    let (places, free, elsewhere) = (lvm.places("vg"), lvm.free(&image), lvm.free(&other));
    drop(lvm);
    let mut random = Random::new(8);
    let mut maps = BTreeMap::new();
    for name in ["here", "both", "there"] {
        let made = content(dir.path(), len(&places[name]), "mkfs.ext4", &mut random);
        write(&places[name], &made.bytes);
        maps.insert(name, made.free);
    }
    // `pvs` counts the orphan's bytes as free extents of no group.
    let free: ExtentMap = free.within(parts[0]).collect();
    assert_eq!(
        unused(&open(&image), 50 * MIB),
        union(&[&free, &translate(&places["here"], &maps["here"], &image)])
    );
    assert_whole(&open(&image).volumes()[1], "no volume group");
    // The other disk has no partitions.
    let expected = union(&[&elsewhere, &translate(&places["there"], &maps["there"], &other)]);
    assert_eq!(unused(&open(&other), 20 * MIB), expected);
    let map = open(&other);
    let parts_elsewhere: Vec<_> = map
        .volumes()
        .iter()
        .filter(|v| matches!(&v.usage, Usage::Whole { reason } if reason.contains("not on this disk")))
        .collect();
    assert_eq!(parts_elsewhere.len(), 2, "{:?}", map.volumes());
}

#[test]
fn the_newest_of_sound_metadata_copies_holds_and_a_damaged_one_makes_all_doubtful() {
    // Small areas make the texts go round after a few changes.
    let mut pair = Pair::new("--metadatasize 32k --dataalignment 4k --pvmetadatacopies 2");
    let parts = pair.parts.clone();
    let area = |number: usize| Extent::at(parts[number].start, 36 << 10);
    let file = File::options().read(true).write(true).open(&pair.image).unwrap();
    let read = |extent: Extent| {
        let mut bytes = vec![0; extent.len() as usize];
        file.read_exact_at(&mut bytes, extent.start).unwrap();
        bytes
    };
    let mut wrapped = false;
    for i in 0..18 {
        pair.lvm().run(&format!("vgchange -q --addtag round{i} vg"));
        run("sync", &[text(&pair.image)]);
        let header = &read(area(0))[AREA..];
        let number = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
        wrapped |= number(40) + number(48) > number(32);
        assert_eq!(open(&pair.image).volumes().len(), 4, "round {i}");
    }
    assert!(wrapped, "no text went round the end of its area");

    let old = read(area(0));
    pair.lvm().create("three", "-L 4m vg $0");
    pair.lvm().run("lvremove -q -y vg/three");
    pair.lvm().create("new", "-L 3m vg $0");
    let [one, two, free] = pair.fill();
    let expected = union(&[&one, &two, &free]);
    assert_eq!(pair.unused(), expected);
    // One of the areas missed the last changes, as after a crash.
    let new = read(area(0));
    assert_ne!(new, old);
    file.write_all_at(&old, area(0).start).unwrap();
    assert_eq!(pair.unused(), expected);
    file.write_all_at(&new, area(0).start).unwrap();

    let place = |number: usize, at: usize| pair.parts[number].start + at as u64;
    let text_at = AREA + u64::from_le_bytes(new[AREA + 40..AREA + 48].try_into().unwrap()) as usize;
    for (what, at, why) in [
        ("label", place(0, 600), "label's checksum"),
        ("magic", place(0, AREA + 5), "checksum"),
        ("text", place(0, text_at + 100), "text's checksum"),
    ] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
        pair.assert_whole(what, why);
        file.write_all_at(&byte, at).unwrap();
    }
    assert_eq!(pair.unused(), expected);

    // A change that was not finished: the second slot is filled.
    let mut begun = new.clone();
    let slot: Vec<u8> = begun[AREA + 40..AREA + 64].to_vec();
    begun[AREA + 64..AREA + 88].copy_from_slice(&slot);
    let sum = lvm::crc(&begun[AREA + 4..TEXT]);
    begun[AREA..AREA + 4].copy_from_slice(&sum.to_le_bytes());
    file.write_all_at(&begun, area(0).start).unwrap();
    pair.assert_whole("precommitted", "not finished");
    file.write_all_at(&new, area(0).start).unwrap();

    // A partition copied over another one: which of the two is in use?
    let twin = read(pair.parts[0]);
    file.write_all_at(&twin, pair.parts[1].start).unwrap();
    let map = open(&pair.image);
    assert_eq!(unused(&map, PAIR * MIB).bytes(), 0, "{:?}", map.volumes());
}

#[test]
fn old_metadata_is_not_believed_beside_a_volume_whose_own_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let parts = disk(&image, PAIR, &[(1, 20), (24, 20)]);
    let lvm = Lvm::attach(&[(&image, parts[0]), (&image, parts[1])]);
    lvm.run("pvcreate -q $0 $1");
    lvm.run("vgcreate -q -s 1m vg $0");
    run("sync", &[text(&image)]);
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let mut old = vec![0; MIB as usize];
    file.read_exact_at(&mut old, parts[0].start).unwrap();
    // Then the group grows, and gets a volume on its old part; the metadata there is lost again.
    lvm.run("vgextend -q vg $1");
    lvm.create("one", "-L 6m vg $0");
    drop(lvm);
    file.write_all_at(&old, parts[0].start).unwrap();
    let free = 13 * MIB + 19 * MIB;
    assert_eq!(unused(&open(&image), PAIR * MIB).bytes(), free, "the newer metadata holds");
    file.write_all_at(&[0; 16], parts[1].start + AREA as u64).unwrap();
    let map = open(&image);
    assert_whole(&map.volumes()[0], "newer metadata");
    assert_whole(&map.volumes()[1], "checksum");
    assert_eq!(unused(&map, PAIR * MIB).bytes(), 0);
}

#[test]
fn areas_that_are_not_kept_up_to_date_are_not_believed() {
    let mut pair = Pair::new("");
    pair.lvm().run("pvchange -q --metadataignore y $1");
    pair.lvm().create("more", "-L 3m vg $1");
    let [one, two, free] = pair.fill();
    assert_eq!(pair.unused(), union(&[&one, &two, &free]));
    // Without the other volume's metadata nothing is known of it.
    let file = File::options().write(true).open(&pair.image).unwrap();
    file.write_all_at(&[0; 4096], pair.parts[0].start).unwrap();
    assert_whole(&open(&pair.image).volumes()[1], "no volume group");
}

#[test]
fn a_virtual_machine_s_disk_in_a_volume_is_used_whole() {
    let mut pair = Pair::new("");
    let [one, two, free] = pair.fill();
    assert_eq!(pair.unused(), union(&[&one, &two, &free]));
    let start = pair.places["one"][0].at;
    let mut entry = [0; 66];
    entry[4] = 0x83;
    entry[8..16].copy_from_slice(&[0, 8, 0, 0, 0, 8, 0, 0]);
    entry[64..].copy_from_slice(&[0x55, 0xaa]);
    let file = File::options().write(true).open(&pair.image).unwrap();
    file.write_all_at(&entry, start + 446).unwrap();
    assert_eq!(pair.unused(), union(&[&two, &free]));
    let map = open(&pair.image);
    let volume = map.volumes().iter().find(|v| v.logical.as_deref() == Some("vg/one")).unwrap();
    assert!(matches!(&volume.usage, Usage::Whole { reason } if reason.contains("partitions of its own")));
    // The same above: a table before a physical volume on the whole disk.
    let bare = pair.dir.path().join("bare");
    empty_image(&bare, 20 * MIB);
    let lvm = Lvm::attach(&[(&bare, Extent::new(0, 20 * MIB))]);
    lvm.group("whole", "", "-s 1m");
    drop(lvm);
    assert_eq!(unused(&open(&bare), 20 * MIB).bytes(), 19 * MIB);
    File::options().write(true).open(&bare).unwrap().write_all_at(&entry, 446).unwrap();
    assert_eq!(unused(&open(&bare), 20 * MIB).bytes(), 0);
}

#[test]
fn a_damaged_bitmap_in_a_logical_volume_is_reported_by_its_name() {
    let mut pair = Pair::new("");
    pair.fill();
    let fs_image = pair.dir.path().join("two");
    fs::write(&fs_image, read_logical(&pair.image, "vg/two")).unwrap();
    let out = run("dumpe2fs", &[text(&fs_image)]);
    let place = out.split("Block bitmap at ").nth(1).unwrap();
    let bitmap: u64 = place.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();
    let at = bitmap * 1024 + 1000;
    let stripe = pair.places["two"]
        .iter()
        .find(|place| (place.offset..place.offset + place.len).contains(&at))
        .unwrap();
    let file = File::options().write(true).open(&pair.image).unwrap();
    file.write_all_at(&[0x5a], stripe.at + at - stripe.offset).unwrap();
    let map = open(&pair.image);
    unused(&map, PAIR * MIB);
    let [finding] = &map.findings()[..] else { panic!("{:?}", map.findings()) };
    assert_eq!(finding.partition, Some(1));
    assert!(finding.what.starts_with("vg/two: 1 block group copied whole"), "{}", finding.what);
}
