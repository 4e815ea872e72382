//! The parameters of each action in either edition, and their checks: missing, unknown, wrong type.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::gate::Fault;
use crate::cloud::tencent::Edition;

/// The type of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    Text,
    Whole,
    Flag,
    Texts,
    Object,
    Objects,
}

use Type::{Flag, Object, Objects, Text, Texts, Whole};

#[derive(Clone, Copy, Debug)]
struct Parameter {
    name: &'static str,
    kind: Type,
    required: bool,
    only: Option<Edition>,
}

const fn may(name: &'static str, kind: Type) -> Parameter {
    Parameter { name, kind, required: false, only: None }
}

const fn must(name: &'static str, kind: Type) -> Parameter {
    Parameter { name, kind, required: true, only: None }
}

const fn public(name: &'static str, kind: Type) -> Parameter {
    Parameter { name, kind, required: false, only: Some(Edition::Public) }
}

const fn tce(name: &'static str, kind: Type) -> Parameter {
    Parameter { name, kind, required: false, only: Some(Edition::Tce) }
}

const ACTIONS: &[(&str, &[Parameter])] = &[
    ("DescribeImportImageOs", &[]),
    (
        "ImportImage",
        &[
            must("Architecture", Text),
            must("OsType", Text),
            must("OsVersion", Text),
            must("ImageUrl", Text),
            must("ImageName", Text),
            may("ImageDescription", Text),
            may("DryRun", Flag),
            may("Force", Flag),
            tce("PublicImage", Flag),
            public("TagSpecification", Objects),
            public("LicenseType", Text),
            public("BootMode", Text),
            public("ImageFamily", Text),
            public("ImportImageDataDiskList", Objects),
        ],
    ),
    (
        "DescribeImages",
        &[
            may("ImageIds", Texts),
            may("Filters", Objects),
            may("Offset", Whole),
            may("Limit", Whole),
            may("InstanceType", Text),
            tce("HostIp", Text),
        ],
    ),
    ("DescribeImageQuota", &[]),
    ("DeleteImages", &[must("ImageIds", Texts), public("DeleteBindedSnap", Flag), public("DryRun", Flag)]),
    ("ModifyImageAttribute", &[must("ImageId", Text), may("ImageName", Text), may("ImageDescription", Text)]),
    (
        "RunInstances",
        &[
            must("Placement", Object),
            must("ImageId", Text),
            may("InstanceType", Text),
            may("InstanceChargeType", Text),
            may("SystemDisk", Object),
            may("DataDisks", Objects),
            may("VirtualPrivateCloud", Object),
            may("InternetAccessible", Object),
            may("InstanceCount", Whole),
            may("InstanceName", Text),
            may("LoginSettings", Object),
            may("SecurityGroupIds", Texts),
            may("HostName", Text),
            may("UserData", Text),
            may("ClientToken", Text),
            may("TagSpecification", Objects),
            may("DryRun", Flag),
        ],
    ),
    (
        "DescribeInstances",
        &[may("InstanceIds", Texts), may("Filters", Objects), may("Offset", Whole), may("Limit", Whole)],
    ),
    ("DescribeInstancesStatus", &[may("InstanceIds", Texts), may("Offset", Whole), may("Limit", Whole)]),
    ("StartInstances", &[must("InstanceIds", Texts)]),
    (
        "StopInstances",
        &[
            must("InstanceIds", Texts),
            may("ForceStop", Flag),
            may("StopType", Text),
            may("StoppedMode", Text),
        ],
    ),
    ("TerminateInstances", &[must("InstanceIds", Texts)]),
];

/// Fields of signature v1 that are no action's parameters.
const COMMON: &[&str] = &[
    "Action",
    "Version",
    "Region",
    "Timestamp",
    "Nonce",
    "SecretId",
    "Signature",
    "SignatureMethod",
    "Token",
    "Language",
    "RequestClient",
];

/// Whether the lab has the action.
pub fn knows(action: &str) -> bool {
    ACTIONS.iter().any(|(name, _)| *name == action)
}

/// The checked parameters of a request. `form` says that every value arrived as text.
pub fn check(
    action: &str,
    edition: Edition,
    given: &Value,
    form: bool,
) -> Result<BTreeMap<&'static str, Value>, Fault> {
    let parameters = ACTIONS.iter().find(|(name, _)| *name == action).map_or(&[][..], |(_, list)| list);
    let parameters: Vec<&Parameter> =
        parameters.iter().filter(|p| p.only.is_none_or(|only| only == edition)).collect();
    let empty = Map::new();
    let given = given.as_object().unwrap_or(&empty);
    let mut checked = BTreeMap::new();
    for parameter in &parameters {
        match given.get(parameter.name) {
            None | Some(Value::Null) if parameter.required => {
                return Err(Fault::new(
                    "MissingParameter",
                    format!("The request is missing a required parameter `{}`.", parameter.name),
                ));
            }
            None | Some(Value::Null) => {}
            Some(value) => {
                let value = typed(parameter.kind, value, form).ok_or_else(|| {
                    Fault::new(
                        "InvalidParameter",
                        format!("The value type of parameter `{}` is not valid.", parameter.name),
                    )
                })?;
                checked.insert(parameter.name, value);
            }
        }
    }
    let known = |name: &str| {
        parameters.iter().any(|parameter| parameter.name == name) || (form && COMMON.contains(&name))
    };
    match given.keys().find(|name| !known(name)) {
        Some(name) => {
            Err(Fault::new("UnknownParameter", format!("The parameter `{name}` is not recognized.")))
        }
        None => Ok(checked),
    }
}

fn typed(kind: Type, value: &Value, form: bool) -> Option<Value> {
    match (kind, value) {
        (Text, Value::String(_)) | (Flag, Value::Bool(_)) | (Object, Value::Object(_)) => Some(value.clone()),
        (Whole, Value::Number(number)) if number.is_u64() => Some(value.clone()),
        (Whole, Value::String(text)) if form => text.parse::<u64>().ok().map(Value::from),
        (Flag, Value::String(text)) if form => {
            text.to_ascii_lowercase().parse::<bool>().ok().map(Value::from)
        }
        (Texts, Value::Array(items)) if items.iter().all(Value::is_string) => Some(value.clone()),
        (Objects, Value::Array(items)) if items.iter().all(Value::is_object) => Some(value.clone()),
        _ => None,
    }
}
