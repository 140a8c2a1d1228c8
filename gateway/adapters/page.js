(function () {
  var wait = 2000;
  function look() {
    var shown = document.querySelector("main");
    if (!shown.hasAttribute("data-live")) return;
    if (document.hidden) { setTimeout(look, wait); return; }
    fetch(location.href, { headers: { accept: "text/html" }, cache: "no-store" })
      .then(function (answer) { return answer.ok ? answer.text() : null; })
      .then(function (text) {
        if (text === null) return;
        var fresh = new DOMParser().parseFromString(text, "text/html");
        var main = fresh.querySelector("main");
        if (!main) return;
        document.title = fresh.title;
        main.querySelectorAll("[data-part]").forEach(function (part) {
          var old = document.getElementById(part.id);
          if (!old) { location.reload(); return; }
          if (old.outerHTML === part.outerHTML) return;
          var held = document.activeElement && old.contains(document.activeElement) && document.activeElement.id;
          old.className = part.className;
          old.innerHTML = part.innerHTML;
          if (held && document.getElementById(held)) document.getElementById(held).focus();
        });
        if (!main.hasAttribute("data-live")) shown.removeAttribute("data-live");
      })
      .catch(function () {})
      .then(function () { wait = Math.min(wait * 1.1, 10000); setTimeout(look, wait); });
  }
  setTimeout(look, wait);
})();
