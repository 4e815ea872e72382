//! The syntax of LVM's metadata texts: `name = value` and `name { … }`, comments from `#` on (lvm.conf(5) has the same).

use std::collections::BTreeSet;

/// Deepest nesting of sections; group, kind, volume, segment are four.
const MAX_DEPTH: usize = 8;
/// Most nodes and list items of a text together; each takes up to 100 bytes in memory.
const MAX_NODES: usize = 1 << 16;

/// What follows a name.
#[derive(Debug, PartialEq)]
pub(super) enum Value<'a> {
    /// A whole number.
    Number(i64),
    /// A string, its escapes left as they are.
    Text(&'a str),
    /// A list of numbers and strings.
    List(Vec<Value<'a>>),
    /// A section.
    Section(Section<'a>),
}

/// The nodes between two braces, or those of the whole text; no name comes twice.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Section<'a>(pub Vec<(&'a str, Value<'a>)>);

type Parsed<T> = Result<T, String>;

impl<'a> Section<'a> {
    /// Reads a text. An error says where it breaks off.
    pub fn parse(text: &'a str) -> Parsed<Section<'a>> {
        // The stored text may end with the NUL that ended it in memory.
        let mut parser = Parser { text: text.trim_end_matches('\0'), at: 0, nodes: 0 };
        parser.section(0)
    }

    /// The value called `name`.
    pub fn get(&self, name: &str) -> Option<&Value<'a>> {
        self.0.iter().find(|(own, _)| *own == name).map(|(_, value)| value)
    }

    /// The number called `name`, which must be there and not negative.
    pub fn number(&self, name: &str) -> Parsed<u64> {
        match self.get(name) {
            Some(Value::Number(number)) => {
                u64::try_from(*number).map_err(|_| format!("its {name} is {number}"))
            }
            _ => Err(format!("its {name} is no number")),
        }
    }

    /// The string called `name`, which must be there.
    pub fn string(&self, name: &str) -> Parsed<&'a str> {
        match self.get(name) {
            Some(Value::Text(text)) => Ok(text),
            _ => Err(format!("its {name} is no string")),
        }
    }

    /// The strings of the list called `name`, none when it is not there.
    pub fn strings(&self, name: &str) -> Parsed<Vec<&'a str>> {
        let string = |value: &Value<'a>| match value {
            Value::Text(text) => Ok(*text),
            _ => Err(format!("its {name} holds more than strings")),
        };
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::List(list)) => list.iter().map(string).collect(),
            Some(_) => Err(format!("its {name} is no list")),
        }
    }

    /// The sections in this one, by name.
    pub fn sections(&self) -> impl Iterator<Item = (&'a str, &Section<'a>)> {
        self.0.iter().filter_map(|(name, value)| match value {
            Value::Section(section) => Some((*name, section)),
            _ => None,
        })
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    nodes: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    /// The next character that is neither white space nor in a comment.
    fn peek(&mut self) -> Option<char> {
        loop {
            let rest = self.rest();
            let skipped = rest.trim_ascii_start();
            self.at += rest.len() - skipped.len();
            if !skipped.starts_with('#') {
                return skipped.chars().next();
            }
            self.at += skipped.find('\n').unwrap_or(skipped.len());
        }
    }

    /// Takes as many bytes as `wanted` holds for.
    fn take(&mut self, wanted: impl Fn(u8) -> bool) -> &'a str {
        let rest = self.rest();
        let len = rest.bytes().take_while(|byte| wanted(*byte)).count();
        self.at += len;
        rest.get(..len).unwrap_or_default()
    }

    fn wrong<T>(&self) -> Parsed<T> {
        Err(format!("its metadata text cannot be understood at {}", self.at))
    }

    fn count(&mut self) -> Parsed<()> {
        self.nodes += 1;
        if self.nodes > MAX_NODES { Err("its metadata text has too many parts".into()) } else { Ok(()) }
    }

    /// The nodes up to the closing brace, or in the outermost section up to the end.
    fn section(&mut self, depth: usize) -> Parsed<Section<'a>> {
        let mut nodes = Vec::new();
        let mut names = BTreeSet::new();
        loop {
            match self.peek() {
                None if depth == 0 => break,
                Some('}') if depth > 0 => {
                    self.at += 1;
                    break;
                }
                None => return Err("its metadata text ends inside a section".into()),
                Some(_) => {}
            }
            self.count()?;
            let name = self.take(is_name);
            if name.is_empty() || !names.insert(name) {
                return self.wrong();
            }
            let value = match self.peek() {
                Some('{') if depth < MAX_DEPTH => {
                    self.at += 1;
                    Value::Section(self.section(depth + 1)?)
                }
                Some('=') => {
                    self.at += 1;
                    self.value()?
                }
                _ => return self.wrong(),
            };
            nodes.push((name, value));
        }
        Ok(Section(nodes))
    }

    fn value(&mut self) -> Parsed<Value<'a>> {
        match self.peek() {
            Some('[') => {
                self.at += 1;
                self.list()
            }
            _ => self.scalar(),
        }
    }

    fn scalar(&mut self) -> Parsed<Value<'a>> {
        match self.peek() {
            Some('"') => self.string(),
            Some('-' | '0'..='9') => match self.take(is_name).parse() {
                Ok(number) => Ok(Value::Number(number)),
                Err(_) => self.wrong(),
            },
            _ => self.wrong(),
        }
    }

    fn string(&mut self) -> Parsed<Value<'a>> {
        self.at += 1;
        let rest = self.rest();
        let mut escaped = false;
        for (i, byte) in rest.bytes().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => {
                    self.at += i + 1;
                    return Ok(Value::Text(rest.get(..i).unwrap_or_default()));
                }
                _ => {}
            }
        }
        Err("its metadata text ends inside a string".into())
    }

    fn list(&mut self) -> Parsed<Value<'a>> {
        let mut list = Vec::new();
        if self.peek() == Some(']') {
            self.at += 1;
            return Ok(Value::List(list));
        }
        loop {
            self.count()?;
            list.push(self.scalar()?);
            let after = self.peek();
            self.at += usize::from(after.is_some());
            match after {
                Some(',') => {}
                Some(']') => return Ok(Value::List(list)),
                _ => return self.wrong(),
            }
        }
    }
}

/// Whether a byte may be part of a name or number.
pub(super) fn is_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte)
}
