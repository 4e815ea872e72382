//! The configuration file: defaults for options, under their own names.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

/// Read when no other file is named; it need not be there.
pub const PATH: &str = "/etc/haul/haul.toml";

/// No configuration is longer, in bytes.
const MAX_LEN: u64 = 1 << 20;

/// What a file may set: an option's long name with underscores. The environment calls it `HAUL_` and the same in capitals.
pub const KEYS: [&str; 9] = [
    "bandwidth_limit",
    "bucket",
    "connect_to",
    "cos_endpoint",
    "cvm_endpoint",
    "edition",
    "path_style",
    "region",
    "state_dir",
];

/// What a configuration file sets.
#[derive(Clone, Debug, Default)]
pub struct File {
    /// The file that was read, if any.
    pub path: Option<PathBuf>,
    values: BTreeMap<String, String>,
}

impl File {
    /// The file that `--config` among `arguments` names, else the variable `named`, else the one at [`PATH`].
    pub fn find(arguments: impl IntoIterator<Item = OsString>, named: Option<OsString>) -> Result<Self> {
        let mut arguments = arguments.into_iter();
        let mut path = named;
        while let Some(argument) = arguments.next().filter(|argument| argument != "--") {
            if argument == "--config" {
                path = arguments.next();
            } else if let Some(value) = argument.to_str().and_then(|text| text.strip_prefix("--config=")) {
                path = Some(value.into());
            }
        }
        match path {
            Some(path) => File::read(Path::new(&path)),
            None if Path::new(PATH).exists() => File::read(Path::new(PATH)),
            None => Ok(File::default()),
        }
    }

    /// Reads the file at `path`. A key it does not know is an error: a misspelt one would do nothing.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = |why: String| {
            Error::new(Kind::Usage, "config.file", format!("cannot use the configuration {}", path.display()))
                .because(why)
                .fact("path", path.display())
        };
        let length = std::fs::metadata(path).map_err(|error| failed(error.to_string()))?.len();
        if length > MAX_LEN {
            return Err(failed(format!("it is {length} bytes long")));
        }
        let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            // The message alone: the parser's own report repeats the line, which may hold anything.
            let line =
                error.span().map_or(0, |span| text[..span.start.min(text.len())].lines().count().max(1));
            failed(format!("line {line}: {}", error.message()))
        })?;
        let mut values = BTreeMap::new();
        for (key, value) in table {
            if !KEYS.contains(&key.as_str()) {
                let remedy = match key.contains("secret") || key.contains("token") {
                    true => {
                        "keys belong in TENCENTCLOUD_SECRET_ID and TENCENTCLOUD_SECRET_KEY, or tccli's files"
                            .to_owned()
                    }
                    false => format!("it may set {}", KEYS.join(", ")),
                };
                return Err(failed(format!("{key:?} is not known")).remedy(remedy));
            }
            let value = match value {
                toml::Value::String(text) => text,
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Boolean(flag) => flag.to_string(),
                _ => return Err(failed(format!("the value of {key:?} is no text, number or truth value"))),
            };
            values.insert(key, value);
        }
        Ok(File { path: Some(path.to_owned()), values })
    }

    /// What it sets `key` to.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }
}

/// The environment's name of a key.
pub fn variable(key: &str) -> String {
    format!("HAUL_{}", key.to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<File> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        File::read(file.path())
    }

    #[test]
    fn a_file_sets_what_it_names_and_nothing_else() {
        let file = read("region = \"ap-guangzhou\"\npath_style = true\nbandwidth_limit = 1000\n").unwrap();
        assert_eq!(file.get("region"), Some("ap-guangzhou"));
        assert_eq!((file.get("path_style"), file.get("bandwidth_limit")), (Some("true"), Some("1000")));
        assert_eq!(file.get("bucket"), None);
        for (text, why) in [
            ("regoin = \"x\"", "\"regoin\" is not known"),
            ("secret_key = \"canary\"", "\"secret_key\" is not known"),
            ("bucket = [1]", "\"bucket\""),
            ("x\ny", "line 1"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.kind() == Kind::Usage && error.why().contains(why), "{error:?}");
            assert!(!format!("{error:?}").contains("canary"));
        }
    }

    #[test]
    fn the_file_named_last_on_the_command_line_counts_before_the_environments() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).into_os_string();
        for name in ["a", "b"] {
            std::fs::write(path(name), format!("bucket = \"{name}\"")).unwrap();
        }
        let found = |args: Vec<OsString>, named| File::find(args, named).unwrap();
        assert_eq!(found(vec!["--config".into(), path("a")], Some(path("b"))).get("bucket"), Some("a"));
        assert_eq!(found(vec!["check".into()], Some(path("b"))).get("bucket"), Some("b"));
        assert!(File::find([], Some("/nonexistent".into())).is_err());
    }
}
