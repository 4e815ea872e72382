//! The descriptor: the text that names a disk's type, parent and extents. Pure; the grammar is that of "Virtual Disk
//! Format 5.0", section "The Descriptor File".

use super::header::bad_field;
use crate::error::Result;

/// How every descriptor begins, in capitals or not.
pub const SIGNATURE: &[u8; 21] = b"# Disk DescriptorFile";
/// `parentCID` of a disk without a parent.
pub const NO_PARENT: u32 = u32::MAX;
/// The most extents haul reads of a disk: 64 TiB in extents of 2 GiB.
const MAX_EXTENTS: usize = 32_768;
/// The largest disk, in sectors: its length in bytes is a file's length.
const MAX_SECTORS: u64 = (i64::MAX / 512) as u64;

/// Whether the text that starts with `start` is a descriptor.
pub(super) fn is_one(start: &[u8]) -> bool {
    start.get(..SIGNATURE.len()).is_some_and(|start| start.eq_ignore_ascii_case(SIGNATURE))
}

/// A descriptor, its values without quotes. Keys haul does not need are left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// `createType`.
    pub create_type: String,
    /// `CID`, the content id, as it is written.
    pub cid: Option<String>,
    /// `parentCID`, the content id of the parent disk.
    pub parent_cid: u32,
    /// `parentFileNameHint`, where the parent disk is.
    pub parent_hint: Option<String>,
    /// `ddb.adapterType`.
    pub adapter_type: Option<String>,
    /// `ddb.virtualHWVersion`.
    pub hardware_version: Option<String>,
    /// The extents, in the order of the disk.
    pub extents: Vec<ExtentLine>,
}

/// One line of the extent description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtentLine {
    /// Where the line is in the file, in bytes.
    pub at: u64,
    /// Whether it may be read (access is not NOACCESS).
    pub readable: bool,
    /// Length in sectors.
    pub sectors: u64,
    /// What it is.
    pub kind: ExtentKind,
    /// Name of its file.
    pub file: Option<String>,
    /// Where in that file it begins, in sectors.
    pub offset: u64,
}

/// The type of an extent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// FLAT and VMFS: the bytes as they are.
    Flat,
    /// SPARSE: a file with grain tables.
    Sparse,
    /// ZERO: all zeroes, no file.
    Zero,
    /// Anything else, by its name.
    Other(String),
}

impl Descriptor {
    /// Reads the descriptor `text`, which is at `base` of the image called `image`; it ends at a zero byte, if there
    /// is one. What haul refuses to read is not an error here.
    pub fn parse(image: &str, text: &[u8], base: u64) -> Result<Self> {
        let text = text.split(|byte| *byte == 0).next().unwrap_or(&[]);
        if !is_one(text) {
            let why = "the text does not begin with \"# Disk DescriptorFile\"";
            return Err(bad_field(image, "descriptor", base, why));
        }
        let mut found = Found::default();
        let mut at = base;
        for line in text.split(|byte| *byte == b'\n') {
            if let Err((field, why)) = found.line(String::from_utf8_lossy(line).trim(), at) {
                return Err(bad_field(image, field, at, why));
            }
            at += line.len() as u64 + 1;
        }
        found.finish().map_err(|(field, why)| bad_field(image, field, base, why))
    }

    /// Length of the disk in sectors.
    pub fn sectors(&self) -> u64 {
        self.extents.iter().map(|extent| extent.sectors).sum()
    }
}

/// A field and what is wrong with it.
type Fault = (&'static str, String);

/// What the lines so far say.
#[derive(Default)]
struct Found {
    descriptor: Descriptor,
    version: Option<String>,
    create_type: Option<String>,
    parent_cid: Option<String>,
    sectors: u64,
}

impl Found {
    fn line(&mut self, line: &str, at: u64) -> std::result::Result<(), Fault> {
        if line.is_empty() || line.starts_with('#') {
            return Ok(());
        }
        let first = line.split_whitespace().next().unwrap_or_default();
        if ["RW", "RDONLY", "NOACCESS"].iter().any(|access| first.eq_ignore_ascii_case(access)) {
            return self.extent(line, at);
        }
        // A line that is neither could be an extent whose first word is damaged: without it the disk is shorter.
        let not_one = || ("descriptor", "the line is no comment, no extent and no value".to_owned());
        let (key, value) = line.split_once('=').ok_or_else(not_one)?;
        let (key, value) = (key.trim().to_ascii_lowercase(), value.trim());
        if key.is_empty() || key.contains(|c: char| c.is_whitespace() || c == '"') {
            return Err(not_one());
        }
        let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value);
        let descriptor = &mut self.descriptor;
        let (field, place) = match key.as_str() {
            "version" => ("version", &mut self.version),
            "cid" => ("CID", &mut descriptor.cid),
            "parentcid" => ("parentCID", &mut self.parent_cid),
            "createtype" => ("createType", &mut self.create_type),
            "parentfilenamehint" => ("parentFileNameHint", &mut descriptor.parent_hint),
            "ddb.adaptertype" => ("ddb.adapterType", &mut descriptor.adapter_type),
            "ddb.virtualhwversion" => ("ddb.virtualHWVersion", &mut descriptor.hardware_version),
            _ => return Ok(()),
        };
        match place {
            Some(_) => Err((field, "it is there twice".into())),
            None => {
                *place = Some(value.to_owned());
                Ok(())
            }
        }
    }

    /// `access sectors type ["file" [offset]]`.
    fn extent(&mut self, line: &str, at: u64) -> std::result::Result<(), Fault> {
        let fault = |why: &str| Err(("extent", why.to_owned()));
        let (words, quoted) = match line.split_once('"') {
            Some((words, rest)) => (words, Some(rest)),
            None => (line, None),
        };
        let words: Vec<&str> = words.split_whitespace().collect();
        let [access, sectors, kind] = words[..] else {
            return fault("it is not an access, a number of sectors, a type, and a name in quotes");
        };
        let Ok(sectors) = sectors.parse::<u64>() else { return fault("its length is no number") };
        let kind = match kind.to_ascii_uppercase() {
            name if name == "FLAT" || name == "VMFS" => ExtentKind::Flat,
            name if name == "SPARSE" => ExtentKind::Sparse,
            name if name == "ZERO" => ExtentKind::Zero,
            name => ExtentKind::Other(name),
        };
        let mut extent = ExtentLine {
            at,
            readable: !access.eq_ignore_ascii_case("NOACCESS"),
            sectors,
            kind,
            file: None,
            offset: 0,
        };
        if let Some(quoted) = quoted {
            let Some((file, offset)) = quoted.rsplit_once('"') else { return fault("its name has no end") };
            extent.file = Some(file.to_owned());
            let offset = offset.trim();
            // What else may follow describes physical disks, which are refused.
            if !offset.is_empty() && !matches!(extent.kind, ExtentKind::Other(_)) {
                let Ok(offset) = offset.parse() else { return fault("its offset is no number") };
                extent.offset = offset;
            }
        }
        if matches!(extent.kind, ExtentKind::Flat | ExtentKind::Sparse) && extent.file.is_none() {
            return fault("it names no file");
        }
        if extent.kind == ExtentKind::Sparse && extent.offset != 0 {
            return fault("a sparse extent begins at the start of its file");
        }
        self.sectors = self.sectors.saturating_add(sectors);
        if self.sectors > MAX_SECTORS || self.descriptor.extents.len() == MAX_EXTENTS {
            return fault("with it the disk has too many extents, or sectors");
        }
        self.descriptor.extents.push(extent);
        Ok(())
    }

    fn finish(self) -> std::result::Result<Descriptor, Fault> {
        let missing = |field| move || (field, "it is missing".to_owned());
        let version = self.version.ok_or_else(missing("version"))?;
        if !matches!(version.as_str(), "1" | "2" | "3") {
            return Err(("version", format!("it is {version:?}; versions 1 to 3 exist")));
        }
        let parent = self.parent_cid.ok_or_else(missing("parentCID"))?;
        let parent_cid = u32::from_str_radix(&parent, 16)
            .map_err(|_| ("parentCID", format!("{parent:?} is no hexadecimal number of 32 bits")))?;
        let create_type = self.create_type.ok_or_else(missing("createType"))?;
        if self.descriptor.extents.is_empty() {
            return Err(("extent", "there is none".into()));
        }
        Ok(Descriptor { create_type, parent_cid, ..self.descriptor })
    }
}

/// The descriptor of a disk of `sectors` in the one sparse extent it is embedded in, which is the file `name`.
pub(super) fn embedded(create_type: &str, access: &str, sectors: u64, cid: u32, name: &str) -> String {
    // What VMware's products give a disk on a SCSI adapter that is larger than 2 GiB; smaller ones boot with it too.
    const HEADS: u64 = 255;
    const TRACK: u64 = 63;
    let cylinders = (sectors / (HEADS * TRACK)).max(1);
    format!(
        "# Disk DescriptorFile\n\
         version=1\n\
         encoding=\"UTF-8\"\n\
         CID={cid:08x}\n\
         parentCID=ffffffff\n\
         createType=\"{create_type}\"\n\
         \n\
         # Extent description\n\
         {access} {sectors} SPARSE \"{name}\"\n\
         \n\
         # The Disk Data Base\n\
         #DDB\n\
         \n\
         ddb.adapterType = \"lsilogic\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"{HEADS}\"\n\
         ddb.geometry.sectors = \"{TRACK}\"\n\
         ddb.virtualHWVersion = \"10\"\n"
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "# Disk DescriptorFile\nversion=1\nCID=123a5678\nparentCID=ffffffff\n\
                        createType=\"monolithicFlat\"\n# Extent description\nRW 2048 FLAT \"a-flat.vmdk\" 0\n";

    fn parse(text: &str) -> Result<Descriptor> {
        Descriptor::parse("x", text.as_bytes(), 512)
    }

    #[test]
    fn what_products_write_is_read() {
        let text = "# disk descriptorfile\r\nversion=3\r\nencoding=\"UTF-8\"\r\nCID=fffffffe\r\n\
                    parentCID=FFFFFFFF\r\nisNativeSnapshot=\"no\"\r\ncreatetype=\"vmfs\"\r\n\r\n\
                    # Extent description\r\nRW 41943040 VMFS \"my \"disk\"-flat.vmdk\"\r\nrdonly 8 ZERO\r\n\
                    RW 8 FLAT \"b=c.vmdk\" 128\r\nNOACCESS 8 vmfsRDM \"d\" 0 what ever\r\n\
                    # Change Tracking File\r\nchangeTrackPath=\"a-ctk.vmdk\"\r\n\
                    ddb.adapterType = \"pvscsi\"\r\nddb.virtualHWVersion=19\r\n\0junk";
        let found = parse(text).unwrap();
        assert_eq!((found.create_type.as_str(), found.parent_cid), ("vmfs", NO_PARENT));
        assert_eq!(
            (found.adapter_type.as_deref(), found.hardware_version.as_deref()),
            (Some("pvscsi"), Some("19"))
        );
        assert_eq!(found.sectors(), 41_943_040 + 24);
        let files: Vec<_> = found.extents.iter().map(|e| (e.file.as_deref(), e.offset, e.readable)).collect();
        assert_eq!(
            files,
            [
                (Some("my \"disk\"-flat.vmdk"), 0, true),
                (None, 0, true),
                (Some("b=c.vmdk"), 128, true),
                (Some("d"), 0, false)
            ]
        );
        assert_eq!(found.extents[3].kind, ExtentKind::Other("VMFSRDM".into()));
    }

    #[test]
    fn what_is_written_is_read() {
        let found = parse(&embedded("streamOptimized", "RDONLY", 12_345, 0x0abc, "größe 1.vmdk")).unwrap();
        assert_eq!(found.extents[0].file.as_deref(), Some("größe 1.vmdk"));
        assert_eq!((found.cid.as_deref(), found.parent_cid), (Some("00000abc"), NO_PARENT));
        assert_eq!((found.sectors(), found.adapter_type.as_deref()), (12_345, Some("lsilogic")));
    }

    #[test]
    fn every_bad_line_is_named_with_its_offset() {
        let at = |text: &str| 512 + GOOD.find(text).unwrap();
        let extent = "RW 2048 FLAT \"a-flat.vmdk\" 0";
        for (from, to, field, offset) in [
            ("# Disk", "# Disc", "descriptor", 512),
            ("version=1\n", "", "version", 512),
            ("version=1", "version=4", "version", 512),
            ("version=1", "version 1", "descriptor", at("version")),
            ("CID=123a5678", "parentCID=ffffffff", "parentCID", at("parentCID") + 6),
            ("parentCID=ffffffff\n", "", "parentCID", 512),
            ("parentCID=ffffffff", "parentCID=ffffffffe", "parentCID", 512),
            ("createType=", "createKind=", "createType", 512),
            (extent, "", "extent", 512),
            (extent, "RX 2048 FLAT \"a-flat.vmdk\" 0", "descriptor", at(extent)),
            (extent, "RW 2048 \"a=flat.vmdk\" 0", "extent", at(extent)),
            (extent, "RW -2048 FLAT \"a-flat.vmdk\" 0", "extent", at(extent)),
            (extent, "RW 36028797018963968 FLAT \"a-flat.vmdk\" 0", "extent", at(extent)),
            (extent, "RW 2048 FLAT", "extent", at(extent)),
            (extent, "RW 2048 FLAT \"a-flat.vmdk", "extent", at(extent)),
            (extent, "RW 2048 FLAT \"a-flat.vmdk\" -1", "extent", at(extent)),
            (extent, "RW 2048 FLAT \"a-flat.vmdk\" 0 0", "extent", at(extent)),
            (extent, "RW 2048 SPARSE \"a-flat.vmdk\" 1", "extent", at(extent)),
        ] {
            let error = parse(&GOOD.replacen(from, to, 1)).unwrap_err();
            let what = format!("x: VMDK field `{field}` at offset {offset} is malformed");
            assert_eq!(error.what(), what, "{to}: {error:?}");
        }
        let many = "RW 1 ZERO\n".repeat(MAX_EXTENTS);
        assert!(parse(&format!("{GOOD}{many}")).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_a_descriptor_or_an_error(lines in prop::collection::vec(".{0,60}", 0..8)) {
            let _ = parse(&format!("{GOOD}{}", lines.join("\n")));
            let _ = parse(&format!("# Disk DescriptorFile\n{}", lines.join("\n")));
        }
    }
}
