//! Shapes on the wire: nested input as dotted form fields (signature v1), and decoding that forgives odd editions.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

/// Nested input as v1 sends it: `{"A": [{"B": 1}]}` becomes `A.0.B=1`; empty and null values are dropped.
pub fn flatten(value: &Value) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    flatten_into("", value, &mut fields);
    fields
}

fn flatten_into(name: &str, value: &Value, fields: &mut BTreeMap<String, String>) {
    let below = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
    match value {
        Value::Null => {}
        Value::Object(members) => {
            members.iter().for_each(|(key, member)| flatten_into(&below(key), member, fields));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, item)| flatten_into(&below(&i.to_string()), item, fields));
        }
        Value::String(text) if text.is_empty() => {}
        Value::String(text) => {
            fields.insert(name.to_owned(), text.clone());
        }
        Value::Bool(_) | Value::Number(_) => {
            fields.insert(name.to_owned(), value.to_string());
        }
    }
}

/// A name of more parts than this is taken as it is: no action nests deeper, and depth is what recursion costs.
const MAX_PARTS: usize = 16;

/// The nested input of dotted fields; every leaf is a string. Objects whose keys are 0, 1, 2 … become arrays.
pub fn unflatten(fields: &BTreeMap<String, String>) -> Value {
    let mut root = Map::new();
    for (name, value) in fields {
        let parts: Vec<&str> = name.split('.').collect();
        insert(&mut root, if parts.len() > MAX_PARTS { &[] } else { &parts }, name, value);
    }
    with_arrays(Value::Object(root))
}

fn insert(members: &mut Map<String, Value>, parts: &[&str], name: &str, value: &str) {
    let (key, rest) = match parts {
        [] => (name, &[][..]),
        [key, rest @ ..] => (*key, rest),
    };
    if rest.is_empty() {
        members.insert(key.to_owned(), Value::String(value.to_owned()));
        return;
    }
    let below = members.entry(key).or_insert(Value::Null);
    if !below.is_object() {
        *below = Value::Object(Map::new());
    }
    if let Value::Object(below) = below {
        insert(below, rest, name, value);
    }
}

fn with_arrays(value: Value) -> Value {
    let Value::Object(members) = value else { return value };
    let mut numbered: BTreeMap<usize, Value> = BTreeMap::new();
    let mut named = Map::new();
    for (key, member) in members {
        let member = with_arrays(member);
        match key.parse() {
            Ok(index) => drop(numbered.insert(index, member)),
            Err(_) => drop(named.insert(key, member)),
        }
    }
    if named.is_empty() && !numbered.is_empty() {
        return Value::Array(numbered.into_values().collect());
    }
    named.extend(numbered.into_iter().map(|(index, member)| (index.to_string(), member)));
    Value::Object(named)
}

/// For `#[serde(deserialize_with)]`: null, or a value of another type than documented, decodes as the default.
pub fn lenient<'de, D: Deserializer<'de>, T: Default + DeserializeOwned>(from: D) -> Result<T, D::Error> {
    Ok(T::deserialize(Value::deserialize(from)?).unwrap_or_default())
}

/// A member by name, in any case: editions disagree on `Linux` and `linux`.
pub fn member<'a>(value: &'a Value, name: &str) -> &'a Value {
    let found =
        value.as_object().and_then(|members| members.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)));
    found.map_or(&Value::Null, |(_, member)| member)
}

/// The strings of an array; anything else in it is left out.
pub fn strings(value: &Value) -> Vec<String> {
    let items = value.as_array().map(Vec::as_slice).unwrap_or_default();
    items.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn nested_input_is_numbered_from_zero() {
        let fields =
            flatten(&json!({"Filters": [{"Name": "status", "Values": ["A", "B"]}], "Limit": 10, "X": "",
            "Force": false}));
        let expected = [
            ("Filters.0.Name", "status"),
            ("Filters.0.Values.0", "A"),
            ("Filters.0.Values.1", "B"),
            ("Force", "false"),
            ("Limit", "10"),
        ];
        assert_eq!(fields, expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    }

    fn tree() -> impl Strategy<Value = Value> {
        let leaf = "[a-z]{1,3}".prop_map(Value::String);
        leaf.prop_recursive(3, 20, 12, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 1..12).prop_map(Value::Array),
                prop::collection::btree_map("[A-Z]{1,3}", inner, 1..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn unflatten_undoes_flatten(members in prop::collection::btree_map("[A-Z]{1,3}", tree(), 1..4)) {
            let value = Value::Object(members.into_iter().collect());
            prop_assert_eq!(unflatten(&flatten(&value)), value);
        }

        #[test]
        fn any_field_names_are_survived(
            fields in prop::collection::btree_map("[A0-9.]{0,6}", "[a-z]{0,2}", 0..8)
        ) {
            unflatten(&fields);
        }
    }
}
