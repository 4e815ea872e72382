//! One connection shared by threads: each sends its requests at once, and replies are taken in the order in which the
//! server gives them.
//!
//! There is no thread for receiving. Whoever waits for a reply reads the next header, and leaves the socket to the
//! thread whose request it is about, which then reads the bytes where they belong.

use std::io;
use std::io::Write;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Uri;
use super::fault::{Fault, protocol};
use super::handshake::{Export, negotiate};
use super::link::Link;
use super::reply::{Head, ReadReply, StatusReply, Stretch};
use super::wire::{Request, cmd};
use crate::unit::{Extent, to_usize};

/// Most requests of one call under way together.
const IN_FLIGHT: usize = 16;
/// How long saying goodbye may take.
const GOODBYE: Duration = Duration::from_secs(1);

/// A connection in its transmission phase.
pub struct Connection {
    export: Export,
    /// For the requests of one call and their replies.
    timeout: Duration,
    /// The socket once more, to be ended by any thread.
    socket: Link,
    sender: Mutex<Sender>,
    receiver: Mutex<Receiver>,
    /// The receiver's link is free, or its header is read, or the connection broke.
    turn: Condvar,
}

struct Sender {
    link: Link,
    /// The last request's name.
    cookie: u64,
}

struct Receiver {
    /// `None` while a thread reads from it.
    link: Option<Link>,
    /// What comes next from the link, once it is known.
    head: Option<Head>,
    /// The requests whose replies are not complete.
    awaited: Vec<u64>,
    broken: Option<Fault>,
}

impl Connection {
    /// Negotiates for the export that `uri` names, in the time that `link` has; the requests of one call and their
    /// replies then may take `timeout`.
    pub fn open(mut link: Link, uri: &Uri, timeout: Duration) -> Result<Self, Fault> {
        let export = negotiate(&mut link, uri)?;
        let sender = Sender { link: link.try_clone()?, cookie: 0 };
        let socket = link.try_clone()?;
        let receiver = Receiver { link: Some(link), head: None, awaited: Vec::new(), broken: None };
        Ok(Connection {
            export,
            timeout,
            socket,
            sender: Mutex::new(sender),
            receiver: Mutex::new(receiver),
            turn: Condvar::new(),
        })
    }

    /// What the server said of the export.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Whether it is of no more use.
    pub fn is_broken(&self) -> bool {
        self.receiver().broken.is_some()
    }

    /// Fills the front of `buf` from `offset`, inside the export, by requests under way together; returns the number
    /// of bytes, which is not 0 unless `buf` is empty.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<usize, Fault> {
        let Export { size, block, structured, .. } = self.export;
        let mut left = Extent::at(offset, buf.len() as u64);
        let mut rest = buf;
        let mut replies = Vec::new();
        while !left.is_empty() && replies.len() < IN_FLIGHT {
            let asked = block.request(left, size);
            let wanted = asked.intersect(left);
            let (target, after) = rest.split_at_mut(to_usize(wanted.len()));
            replies.push(ReadReply::new(asked, wanted, target, structured));
            rest = after;
            left.start = wanted.end;
        }
        let asked: Vec<Extent> = replies.iter().map(ReadReply::asked).collect();
        self.exchange(cmd::READ, &asked, |i, head, link| match replies.get_mut(i) {
            Some(reply) => reply.take(head, link),
            None => Err(protocol("a reply to a request not made")),
        })?;
        match replies.into_iter().find_map(ReadReply::refused) {
            Some(fault) => Err(self.refused(fault)),
            None => Ok(to_usize(left.start - offset)),
        }
    }

    /// What the server knows of `asked`, which is not empty, is aligned as a request, and is shorter than 4 GiB. The
    /// answer begins at its start, and may end before or after its end.
    pub fn status(&self, asked: Extent) -> Result<Stretch, Fault> {
        let Some(context) = self.export.allocation else { return Ok(Stretch::unknown(asked)) };
        let mut reply = StatusReply::new(asked, self.export.size, context);
        self.exchange(cmd::BLOCK_STATUS, &[asked], |_, head, link| reply.take(head, link))?;
        reply.stretch().map_err(|fault| self.refused(fault))
    }

    /// A reply that is complete and says no; one that says goodbye ends the connection.
    fn refused(&self, fault: Fault) -> Fault {
        if matches!(fault, Fault::Refused { .. }) { fault } else { self.end(fault) }
    }

    /// Makes a request for each of `asked`; gives each header of their replies to `take`, with the number of the
    /// request. `take` reads what follows the header and says whether the reply is complete.
    fn exchange(
        &self,
        command: u16,
        asked: &[Extent],
        mut take: impl FnMut(usize, Head, &mut Link) -> Result<bool, Fault>,
    ) -> Result<(), Fault> {
        let deadline = Instant::now() + self.timeout;
        let cookies = self.send(command, asked, deadline)?;
        let mut incomplete = asked.len();
        while incomplete > 0 {
            let (i, head, mut link) = self.receive(&cookies, deadline)?;
            link.until(deadline);
            let complete = take(i, head, &mut link).map_err(|fault| self.end(fault))?;
            let mut receiver = self.receiver();
            receiver.link = Some(link);
            if complete {
                receiver.awaited.retain(|cookie| *cookie != head.cookie);
                incomplete -= 1;
            }
            drop(receiver);
            self.turn.notify_one();
        }
        Ok(())
    }

    /// Sends the requests; returns their names, of which none is awaited before.
    fn send(&self, command: u16, asked: &[Extent], deadline: Instant) -> Result<Vec<u64>, Fault> {
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        let mut message = Vec::new();
        let mut cookies = Vec::new();
        for extent in asked {
            sender.cookie += 1;
            let len = u32::try_from(extent.len());
            let len = len.map_err(|_| Fault::Broken(io::ErrorKind::InvalidInput.into()))?;
            let request = Request { flags: 0, command, cookie: sender.cookie, offset: extent.start, len };
            message.extend(request.encode());
            cookies.push(sender.cookie);
        }
        self.receiver().awaited.extend(&cookies);
        sender.link.until(deadline);
        sender.link.write_all(&message).map_err(|error| self.end(error.into()))?;
        Ok(cookies)
    }

    /// Waits for the next header about one of `cookies`; returns its place among them and the link, which the caller
    /// gives back when it has read what follows.
    fn receive(&self, cookies: &[u64], deadline: Instant) -> Result<(usize, Head, Link), Fault> {
        let place = |head: &Head| cookies.iter().position(|cookie| *cookie == head.cookie);
        let mut receiver = self.receiver();
        loop {
            if let Some(fault) = &receiver.broken {
                return Err(fault.shared());
            }
            // A header about another thread's request leaves the link to that thread.
            let free = receiver.head.as_ref().is_none_or(|head| place(head).is_some());
            if let Some(mut link) = receiver.link.take_if(|_| free) {
                let head = match receiver.head.take() {
                    Some(head) => head,
                    None => {
                        drop(receiver);
                        link.until(deadline);
                        let head = Head::read(&mut link, self.export.structured);
                        let head = head.map_err(|fault| self.end(fault))?;
                        receiver = self.receiver();
                        if !receiver.awaited.contains(&head.cookie) {
                            drop(receiver);
                            return Err(self.end(protocol("a reply to a request not made")));
                        }
                        head
                    }
                };
                if let Some(i) = place(&head) {
                    return Ok((i, head, link));
                }
                receiver.link = Some(link);
                receiver.head = Some(head);
                self.turn.notify_all();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(receiver);
                return Err(self.end(Fault::Broken(io::ErrorKind::TimedOut.into())));
            }
            receiver = self.turn.wait_timeout(receiver, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends the connection for all threads; returns the fault that did it first.
    fn end(&self, fault: Fault) -> Fault {
        self.socket.shut_down();
        let shared = self.receiver().broken.get_or_insert(fault).shared();
        self.turn.notify_all();
        shared
    }

    fn receiver(&self) -> MutexGuard<'_, Receiver> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.is_broken() {
            return;
        }
        let sender = self.sender.get_mut().unwrap_or_else(PoisonError::into_inner);
        let goodbye = Request { flags: 0, command: cmd::DISC, cookie: sender.cookie + 1, offset: 0, len: 0 };
        sender.link.within(GOODBYE);
        // The server may be gone before: then it needs no goodbye.
        let _ = sender.link.write_all(&goodbye.encode());
    }
}
