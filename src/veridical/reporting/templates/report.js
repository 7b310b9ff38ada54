(function () {
  "use strict";
  var touch = window.matchMedia("(pointer: coarse)").matches;
  var narrow = window.matchMedia("(max-width: 34rem)");
  var plots = [];
  document.querySelectorAll("script[data-figure]").forEach(function (holder) {
    var plot = document.getElementById(holder.getAttribute("data-figure"));
    var spec = JSON.parse(holder.textContent);
    var layout = spec.layout || {};
    layout.autosize = true;
    if (touch) layout.dragmode = false; // a finger on a figure scrolls the page
    if (narrow.matches) layout.margin = Object.assign({}, layout.margin, { l: 40, r: 6 });
    Plotly.newPlot(plot, spec.data || [], layout, {
      responsive: true,
      displaylogo: false,
      showTips: false,
      displayModeBar: touch ? false : "hover",
      modeBarButtons: [["toImage", "resetScale2d"]],
    });
    plots.push(plot);
  });
  function fit() {
    plots.forEach(function (plot) { Plotly.Plots.resize(plot); });
  }
  window.addEventListener("beforeprint", fit);
  window.addEventListener("afterprint", fit);
})();
